"""When and where checkpoints are written, and going on from one."""

import dataclasses
import time
from pathlib import Path

from mft_megatron.arguments import Arguments
from mft_megatron.data.dataset import PackedDataset
from mft_megatron.errors import InputError
from mft_megatron.mcore import checkpoint, parallel
from mft_megatron.mcore.step import Trainer
from mft_megatron.run_folder import TOKENIZER, CheckpointInfo, copy_tokenizer
from mft_megatron.training.progress import Progress
from mft_megatron.training.records import event_record
from mft_megatron.training.run_log import RunLog


class Saver:
    """Writes checkpoints of a run into ``--save``; does nothing without it."""

    def __init__(self, arguments: Arguments, dataset: PackedDataset):
        self._arguments = arguments
        self._dataset = dataset

    def due(self, step: int, always: bool) -> bool:
        """Whether to save after ``step``: at ``--save-interval``, and ``always`` at the end."""
        options = self._arguments.checkpoint
        return options.save is not None and (
            always or (options.save_interval is not None and step % options.save_interval == 0)
        )

    def save(self, trainer: Trainer, progress: Progress, log: RunLog) -> None:
        start = time.perf_counter()
        options = self._arguments.checkpoint
        path = checkpoint.save(Path(options.save), trainer, self._info(progress), options)
        log.write(event_record(progress, "save", path=str(path), seconds=round(time.perf_counter() - start, 3)))

    def _info(self, progress: Progress) -> CheckpointInfo:
        a, ledger = self._arguments, self._dataset.ledger
        return CheckpointInfo(
            iteration=progress.step,
            consumed_samples=progress.consumed_samples,
            skipped_steps=progress.skipped_steps,
            architecture=dataclasses.asdict(a.network),
            vocab_size=self._dataset.vocab_size,
            tokenizer={
                **dataclasses.asdict(ledger.tokenizer),
                "stop_token_ids": ledger.chat_template["stop_token_ids"],
            },
            dataset_hash=self._dataset.dataset_hash,
            seed=a.initialization.seed,
            global_batch_size=a.training.global_batch_size,
            has_optimizer=a.checkpoint.save_optim,
            has_rng=a.checkpoint.save_rng,
            precision=a.precision.name,
            layout=parallel.layout(),
        )


def refuse_other_data(arguments: Arguments, dataset: PackedDataset) -> None:
    """Check that the data set is the one the checkpoint was following.

    Raises:
        InputError: another vocabulary, or, unless ``--finetune`` starts a new pass, another data set.
    """
    if arguments.resume is None:
        return
    path, info = arguments.resume
    if info.vocab_size != dataset.vocab_size:
        raise InputError(
            f"--load {path}: made for a vocabulary of {info.vocab_size}, the data set {arguments.data.data_path} has "
            f"{dataset.vocab_size}; preprocess the data with the model's tokenizer"
        )
    if not arguments.checkpoint.finetune and info.dataset_hash != dataset.dataset_hash:
        raise InputError(
            f"--load {path}: saved while training on another data set than --data-path {arguments.data.data_path}; go "
            "on with that one, or start a new pass from these weights with --finetune"
        )


def resume(arguments: Arguments, trainer: Trainer, log: RunLog) -> Progress:
    """Load the checkpoint of ``--load``, if there is one; where the run stands then."""
    if arguments.resume is None:
        return Progress()
    path, info = arguments.resume
    checkpoint.load(Path(path), trainer, info, arguments.checkpoint)
    progress = Progress()
    if not arguments.checkpoint.finetune:
        progress = Progress(info.iteration, info.consumed_samples, info.skipped_steps)
    log.write(event_record(progress, "load", path=path, finetune=arguments.checkpoint.finetune))
    return progress


def keep_tokenizer(folder: str, model: str, log: RunLog) -> None:
    """Copy the tokenizer's files into the run folder, so that an export is complete; where they are gone, say so."""
    if not copy_tokenizer(Path(model), Path(folder) / TOKENIZER):
        log.say(f"the tokenizer {model} is gone: an export of this run will need --tokenizer-model")

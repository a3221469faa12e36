"""When and where checkpoints are written, and going on from one."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from mft_megatron.arguments import Arguments
from mft_megatron.data.dataset import PackedDataset
from mft_megatron.errors import InputError
from mft_megatron.mcore import checkpoint, parallel
from mft_megatron.mcore.step import Trainer
from mft_megatron.run_folder import (
    TOKENIZER,
    CheckpointInfo,
    copy_tokenizer,
    record_best,
    remove_checkpoint,
    restore_best,
    superseded,
)
from mft_megatron.training.progress import Progress
from mft_megatron.training.records import event_record
from mft_megatron.training.run_log import RunLog


class Saver:
    """Writes checkpoints of a run into ``--save``; does nothing without it."""

    def __init__(self, arguments: Arguments, dataset: PackedDataset):
        self._arguments = arguments
        self._dataset = dataset

    def due(self, step: int, always: bool, best: bool = False) -> bool:
        """Whether to save after ``step``: at ``--save-interval``, ``always`` at an end of the run, and where its
        evaluation is the ``best`` so far and that is to be kept."""
        return self._arguments.checkpoint.save is not None and (best or self._asked_for(step, always))

    def save(
        self, trainer: Trainer, progress: Progress, log: RunLog, always: bool, best: bool, state: dict[str, Any]
    ) -> None:
        """Save what is :meth:`due`, with the ``state`` of what validation losses decide.

        The best checkpoint is recorded when it is complete, and only then those that were saved for having been the
        best are removed; one that was asked for never is.
        """
        start = time.perf_counter()
        options = self._arguments.checkpoint
        folder = Path(options.save)
        path = checkpoint.save(folder, trainer, self._info(progress, always, best), options, state)
        details = {"path": str(path), "seconds": round(time.perf_counter() - start, 3)}
        if best and parallel.is_main():
            record_best(folder, progress.step)
        log.write(event_record(progress, "save", **details, **({"best": True} if best else {})))
        if best and parallel.is_main():
            _remove_superseded(folder, progress, log)

    def _asked_for(self, step: int, always: bool) -> bool:
        interval = self._arguments.checkpoint.save_interval
        return always or (interval is not None and step % interval == 0)

    def _info(self, progress: Progress, always: bool, best: bool) -> CheckpointInfo:
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
            decoupled_lr=a.learning_rate.decoupled_lr is not None,
            layout=parallel.layout(),
            best=best,
            asked_for=self._asked_for(progress.step, always),
        )


def _remove_superseded(folder: Path, progress: Progress, log: RunLog) -> None:
    for path in superseded(folder):
        try:
            remove_checkpoint(path)
        except OSError as error:  # a full disk is worse than an ended run, but not now
            log.say(f"{path} is no longer the best checkpoint and cannot be removed ({error}); remove it")
        else:
            log.write(event_record(progress, "remove", path=str(path), reason="no longer the best checkpoint"))


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


def resume(arguments: Arguments, trainer: Trainer, log: RunLog) -> tuple[Progress, dict[str, Any]]:
    """Load the checkpoint of ``--load``, if there is one; where the run stands then, and the state it was saved with.

    A run that goes on in its own folder has the best checkpoint of the state it goes on from, not of a future that it
    is about to replace.
    """
    if arguments.resume is None:
        return Progress(), {}
    path, info = arguments.resume
    options = arguments.checkpoint
    state = checkpoint.load(Path(path), trainer, info, options)
    progress = Progress()
    if not options.finetune:
        progress = Progress(info.iteration, info.consumed_samples, info.skipped_steps)
    log.write(event_record(progress, "load", path=path, finetune=options.finetune))
    best = state.get("stopping", {}).get("run", {}).get("step")
    if options.save is not None and Path(path).resolve().parent == Path(options.save).resolve():
        if parallel.is_main():
            restore_best(Path(options.save), best)
    elif best is not None:
        log.say(f"the best evaluation so far was at step {best}; a checkpoint of it is in {Path(path).parent} alone")
    return progress, state


def keep_tokenizer(folder: str, model: str, log: RunLog) -> None:
    """Copy the tokenizer's files into the run folder, so that an export is complete; where they are gone, say so."""
    if not copy_tokenizer(Path(model), Path(folder) / TOKENIZER):
        log.say(f"the tokenizer {model} is gone: an export of this run will need --tokenizer-model")

"""When and where checkpoints are written, and going on from one."""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing import checkpoint
from mft_megatron.mcore.checkpointing.load_weights import fill_weights
from mft_megatron.mcore.checkpointing.weight_source import CheckpointSource, WeightSource
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder import (
    HUGGINGFACE,
    TOKENIZER,
    CheckpointInfo,
    content_digest,
    copy_tokenizer,
    iteration_folder,
    not_retained,
    record_best,
    remove_checkpoint,
    restore_best,
    superseded,
)

from .events import event_record
from .progress import Progress
from .run_log import RunLog


class ModelSource(WeightSource, Protocol):
    """The model of ``--hf-checkpoint``."""

    def keep(self, target: Path) -> None:
        """Copy into ``target`` what an export is to give back."""

    def close(self) -> None:
        """Close the files; reading opens them again."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """Hugging Face folders that a run reads; opened where the command is read, since training imports no conversion.

    Attributes:
        model: the folder of ``--hf-checkpoint``; ``None`` where no weights are read from it.
        adapter: the folder of ``--hf-adapter``; ``None`` where there is none.
    """

    model: ModelSource | None = None
    adapter: WeightSource | None = None


NO_SOURCES = Sources()


class Saver:
    """Writes checkpoints of a run into ``--save``; does nothing without it."""

    def __init__(self, arguments: Arguments, dataset: PackedDataset, exports: Any = None):
        """
        Args:
            exports: takes checkpoints that are to be exported while the run goes on (``add``), says which of them it
                still needs (``waiting``) and what has become of the others (``poll``); on rank 0 alone.
        """
        self._arguments = arguments
        self._dataset = dataset
        self._exports = exports
        self._base = _base_of_adapters(arguments)
        self._writer = checkpoint.Writer(arguments.checkpoint, arguments.saves_base)

    def due(self, step: int, always: bool, best: bool = False) -> bool:
        """Whether to save after ``step``: at ``--save-interval``, ``always`` at an end of the run, and where its
        evaluation is the ``best`` so far and that is to be kept."""
        return self._arguments.checkpoint.save is not None and (best or self._asked_for(step, always))

    def save(
        self, trainer: Trainer, progress: Progress, log: RunLog, always: bool, best: bool, state: dict[str, Any]
    ) -> None:
        """Save what is :meth:`due`, with the ``state`` of what validation losses decide; with ``--async-save`` it is
        logged when it is complete.

        The best checkpoint is recorded when it is complete, and only then those that were saved for having been the
        best are removed; one that was asked for never is.
        """
        start = time.perf_counter()
        folder = Path(self._arguments.checkpoint.save)
        path, retained = iteration_folder(folder, progress.step), self._arguments.checkpoint.save_retain_interval

        def when_complete() -> None:
            details = {"path": str(path), "seconds": round(time.perf_counter() - start, 3)}
            if best and process_groups.is_main():
                record_best(folder, progress.step)
            log.write(event_record(progress, "save", **details, **({"best": True} if best else {})))
            if self._exports is not None and self._to_export(progress.step):
                self._exports.add(path)
            if process_groups.is_main():
                if best:
                    self._remove(superseded(folder), "no longer the best checkpoint", progress, log)
                if retained is not None:
                    reason = f"not retained by --save-retain-interval {retained}"
                    self._remove(not_retained(folder, retained), reason, progress, log)

        self._writer.save(folder, trainer, self._info(progress, always, best), state, when_complete)

    def poll(self, progress: Progress, log: RunLog) -> None:
        """After each step: complete a checkpoint that was written in the background meanwhile, and tell of exports
        that have ended."""
        self._writer.poll()
        for details in self._exports.poll() if self._exports is not None else ():
            log.write(event_record(progress, "export failed" if "failed" in details else "export", **details))

    def finish(self) -> None:
        """At an end of the run: wait for a checkpoint that is being written in the background."""
        self._writer.finish()

    @contextlib.contextmanager
    def completed_first(self) -> Iterator[None]:
        """Where the run ends within for a reason that all ranks find, a checkpoint that is being written in the
        background is completed before, so that it is not lost."""
        try:
            yield
        except InputError as error:
            if not error.always:
                self.finish()
            raise

    def _remove(self, paths: list[Path], reason: str, progress: Progress, log: RunLog) -> None:
        """Remove checkpoints; one that is still to be exported goes with a later one."""
        spared = self._exports.waiting if self._exports is not None else ()
        for path in (path for path in paths if path not in spared):
            try:
                remove_checkpoint(path)
            except OSError as error:  # a full disk is worse than an ended run, but not now
                log.print(f"{path} is {reason} and cannot be removed ({error}); remove it")
            else:
                log.write(event_record(progress, "remove", path=str(path), reason=reason))

    def _to_export(self, step: int) -> bool:
        interval = self._arguments.checkpoint.save_hf_interval
        return interval is not None and step % interval == 0

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
            vocab_size=model_vocab_size(a, self._dataset),
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
            optimizer=a.optimizer_states,
            distributed_optimizer=a.distributed.use_distributed_optimizer,
            decoupled_lr=a.learning_rate.decoupled_lr is not None,
            layout=process_groups.layout(),
            best=best,
            asked_for=self._asked_for(progress.step, always),
            source=a.resume.info.source if a.resume is not None else "",
            lora=a.adapters.as_dict() if a.adapters is not None else None,
            peft_type=a.lora.peft_type,
            has_base=a.saves_base,
            **self._base,
        )


def _base_of_adapters(arguments: Arguments) -> dict[str, str]:
    """Of a run with adapters: what they belong to, and by what it is known again where checkpoints do not hold it."""
    if arguments.adapters is None or arguments.resume is None:
        return {}
    folder = os.path.abspath(arguments.base.path) if arguments.base is not None else arguments.resume.info.base
    return {"base": folder, "base_digest": "" if arguments.saves_base else content_digest(Path(folder))}


def remove_exported(options: CheckpointArguments, spared: Sequence[Path]) -> None:
    """After the last export of a run: remove checkpoints that were only kept for it, but for ``spared``."""
    if options.save_retain_interval is not None and options.save_hf_interval is not None:
        for path in not_retained(Path(options.save), options.save_retain_interval):
            if path not in spared:
                remove_checkpoint(path)


def refuse_other_data(arguments: Arguments, dataset: PackedDataset) -> None:
    """Check that the data set is the one the checkpoint was following.

    Raises:
        InputError: another vocabulary, or, unless ``--finetune`` starts a new pass, another data set.
    """
    if arguments.resume is None:
        return
    path, info = arguments.resume.path, arguments.resume.info
    # models from Hugging Face have room for more tokens than their tokenizers have
    if info.vocab_size != dataset.vocab_size and not (info.source and info.vocab_size > dataset.vocab_size):
        raise InputError(
            f"--load {path}: made for a vocabulary of {info.vocab_size}, the data set {arguments.data.data_path} has "
            f"{dataset.vocab_size}; preprocess the data with the model's tokenizer"
        )
    if not arguments.weights_alone and info.dataset_hash != dataset.dataset_hash:
        raise InputError(
            f"--load {path}: saved while training on another data set than --data-path {arguments.data.data_path}; go "
            "on with that one, or start a new pass from these weights with --finetune"
        )


def model_vocab_size(arguments: Arguments, dataset: PackedDataset) -> int:
    """Tokens that the model has room for; a model from Hugging Face may have more than the data set's tokenizer."""
    return dataset.vocab_size if arguments.resume is None else arguments.resume.info.vocab_size


def resume(
    arguments: Arguments, trainer: Trainer, log: RunLog, sources: Sources = NO_SOURCES
) -> tuple[Progress, dict[str, Any]]:
    """Load the checkpoint of ``--load``, if there is one; where the run stands then, and the state it was saved with.

    Weights that are not in it come from ``sources``.

    A run that goes on in its own folder has the best checkpoint of the state it goes on from, not of a future that it
    is about to replace.
    """
    if arguments.resume is None:
        return Progress(), {}
    path, info = arguments.resume.path, arguments.resume.info
    options = dataclasses.replace(arguments.checkpoint, finetune=arguments.weights_alone)
    if sources.model is not None:
        with contextlib.closing(sources.model):
            fill_weights(trainer, sources.model)
    elif arguments.base is not None:
        fill_weights(trainer, CheckpointSource(arguments.base.path, arguments.base.info))
    state = {}
    if arguments.base != arguments.resume:
        state = checkpoint.load(path, trainer, info, options)
    if arguments.starts_from_adapter and sources.adapter is not None:
        fill_weights(trainer, sources.adapter, adapters=True)
    progress = Progress()
    if not options.finetune:
        progress = Progress(info.iteration, info.consumed_samples, info.skipped_steps)
    also = {"adapter": arguments.lora.hf_adapter} if arguments.starts_from_adapter else {}
    if arguments.base not in (None, arguments.resume):
        also["base"] = str(arguments.base.path)
    log.write(event_record(progress, "load", path=str(path), finetune=options.finetune, **also))
    best = state.get("stopping", {}).get("run", {}).get("step")
    if options.save is not None and path.resolve().parent == Path(options.save).resolve():
        if process_groups.is_main():
            restore_best(Path(options.save), best)
    elif best is not None:
        log.print(f"the best evaluation so far was at step {best}; a checkpoint of it is in {path.parent} alone")
    return progress, state


def keep_source(arguments: Arguments, sources: Sources) -> None:
    """Copy what was kept of a model from Hugging Face into the run folder, so that an export gives it back."""
    if arguments.resume is None or not arguments.resume.info.source:
        return
    if arguments.starts_from_hf and sources.model is not None:
        sources.model.keep(Path(arguments.checkpoint.save) / HUGGINGFACE)
        return
    source, target = arguments.resume.path.parent / HUGGINGFACE, Path(arguments.checkpoint.save) / HUGGINGFACE
    if source.is_dir() and source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True)


def keep_tokenizer(folder: str, model: str, log: RunLog) -> None:
    """Copy the tokenizer's files into the run folder, so that an export is complete; where they are gone, say so."""
    if not copy_tokenizer(Path(model), Path(folder) / TOKENIZER):
        log.print(f"the tokenizer {model} is gone: an export of this run will need --tokenizer-model")

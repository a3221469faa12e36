"""Checkpoints of a run: when they are saved, which are kept, and how a run resumes from one."""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.data.chat_templates.trained_format import trained_format
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.disk_errors import explain
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

from .epochs import EpochState
from .evaluation import EvaluationState
from .events import event_record
from .progress import Progress
from .run_log import RunLog
from .shares.share_log import RunShareState


class RunState(EvaluationState, EpochState, RunShareState):
    """The state that a run saves with its weights and resumes from, beside the optimizer's; empty before the first."""


class Exports(Protocol):
    """Exports of checkpoints during the run, on rank 0."""

    @property
    def waiting(self) -> Collection[Path]:
        """Checkpoints that are still to be exported, and must not be removed."""

    def add(self, checkpoint: Path) -> None:
        """Export a complete checkpoint after those that were added before."""

    def poll(self) -> Sequence[dict[str, str | float]]:
        """Report exports that have ended: the fields of the event "export", or of "export failed"."""


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

    def check(self, arguments: Arguments) -> None:
        """Check that every folder that the run reads is open.

        Raises:
            ValueError: one is missing, and the run would train beside random weights.
        """
        for option, needed, source in (
            ("--hf-checkpoint", arguments.reads_hf, self.model),
            ("--hf-adapter", arguments.starts_from_adapter, self.adapter),
        ):
            if needed and source is None:
                raise ValueError(f"{option}: open the folder before the run starts")


NO_SOURCES = Sources()


class Saver:
    """Checkpoints of a run in ``--save``; without it nothing is saved."""

    def __init__(self, arguments: Arguments, dataset: PackedDataset, exports: Exports | None = None):
        """
        Args:
            arguments: of the run.
            dataset: that it trains on.
            exports: exports the checkpoints of ``--save-hf-interval``; on rank 0 only.
        """
        self._arguments = arguments
        self._dataset = dataset
        self._exports = exports
        self._folder = None if arguments.checkpoint.save is None else Path(arguments.checkpoint.save)
        self._base, self._base_digest = _base_of_adapters(arguments)
        self._writer = checkpoint.Writer(arguments.checkpoint, arguments.saves_base)

    def due(self, step: int, ending: bool, best: bool = False) -> bool:
        """Whether to save after ``step``.

        Args:
            step: number of steps so far.
            ending: whether the run ends here.
            best: whether the step has the best evaluation so far, and the best checkpoint is to be kept.
        """
        return self._folder is not None and (best or self._asked_for(step, ending))

    def save(
        self, trainer: Trainer, progress: Progress, log: RunLog, ending: bool, best: bool, state: RunState
    ) -> None:
        """Save a checkpoint that is :meth:`due`; with ``--async-save`` it is complete, and logged, only later.

        The best checkpoint is recorded when it is complete, and only then those that were saved for having been the
        best are removed; one that was asked for never is.

        Args:
            trainer: to be saved.
            progress: after the step.
            log: takes the events.
            ending: as in :meth:`due`.
            best: as in :meth:`due`.
            state: of the run, the same on every rank.
        """
        if self._folder is None:
            return
        start, folder = time.perf_counter(), self._folder
        path, retained = iteration_folder(folder, progress.step), self._arguments.checkpoint.save_retain_interval

        def when_complete() -> None:
            seconds = round(time.perf_counter() - start, 3)
            if best:
                consequence = "the checkpoint is complete, and not recorded as the best of the run"
                process_groups.write_on_main(folder, lambda: record_best(folder, progress.step), consequence)
            also = {"best": True} if best else {}
            log.write(event_record(progress, "save", path=str(path), seconds=seconds, **also))
            if self._exports is not None and self._to_export(progress.step):
                self._exports.add(path)
            if process_groups.is_main():
                if best:
                    self._remove(superseded(folder), "no longer the best checkpoint", progress, log)
                if retained is not None:
                    reason = f"not retained by --save-retain-interval {retained}"
                    self._remove(not_retained(folder, retained), reason, progress, log)

        self._writer.save(folder, trainer, self._info(progress, ending, best), dict(state), when_complete)

    def poll(self, progress: Progress, log: RunLog) -> None:
        """Complete a checkpoint that has meanwhile been written in the background, and log exports that have ended."""
        self._writer.poll()
        for details in self._exports.poll() if self._exports is not None else ():
            log.write(event_record(progress, "export failed" if "failed" in details else "export", **details))

    def finish(self) -> None:
        """Wait for a checkpoint that is being written in the background, and complete it."""
        self._writer.finish()

    @contextlib.contextmanager
    def completed_first(self) -> Iterator[None]:
        """Complete a checkpoint that is being written in the background before an error ends the run.

        Not after an error that the other ranks may not have: completing is a collective.
        """
        try:
            yield
        except InputError as error:
            if not error.always:
                self.finish()
            raise

    def _remove(self, paths: Sequence[Path], reason: str, progress: Progress, log: RunLog) -> None:
        """Remove checkpoints; one that is still to be exported is removed with a later one."""
        waiting = self._exports.waiting if self._exports is not None else ()
        for path in (path for path in paths if path not in waiting):
            try:
                remove_checkpoint(path)
            except OSError as error:  # failing to delete an old checkpoint must not stop training
                log.print(f"{path} is {reason} and cannot be removed ({explain(error, path)}); remove it")
            else:
                log.write(event_record(progress, "remove", path=str(path), reason=reason))

    def _to_export(self, step: int) -> bool:
        interval = self._arguments.checkpoint.save_hf_interval
        return interval is not None and step % interval == 0

    def _asked_for(self, step: int, ending: bool) -> bool:
        interval = self._arguments.checkpoint.save_interval
        return ending or (interval is not None and step % interval == 0)

    def _info(self, progress: Progress, ending: bool, best: bool) -> CheckpointInfo:
        a, ledger = self._arguments, self._dataset.ledger
        trained = trained_format(ledger)
        return CheckpointInfo(
            iteration=progress.step,
            consumed_samples=progress.consumed_samples,
            skipped_steps=progress.skipped_steps,
            architecture=dataclasses.asdict(a.network),
            vocab_size=model_vocab_size(a, self._dataset),
            tokenizer={
                **dataclasses.asdict(ledger.tokenizer),
                "stop_token_ids": ledger.chat_template["stop_token_ids"],
                **({} if trained is None else {"chat_template": dataclasses.asdict(trained)}),
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
            layout=process_groups.parallel_layout(),
            best=best,
            asked_for=self._asked_for(progress.step, ending),
            source=a.resume.info.source if a.resume is not None else "",
            lora=a.adapters.as_dict() if a.adapters is not None else None,
            peft_type=a.lora.peft_type,
            has_base=a.saves_base,
            base=self._base,
            base_digest=self._base_digest,
            order_version=order_version(a, self._dataset),
            mft_normalization=a.multi_task.mft_normalization,
        )


def _base_of_adapters(arguments: Arguments) -> tuple[str, str]:
    """The folder of the model that a run's adapters belong to, and its digest if checkpoints do not hold the model.

    Both are empty for a run without adapters, or with a model of its own.
    """
    if arguments.adapters is None or arguments.resume is None:
        return "", ""
    folder = os.path.abspath(arguments.base.path) if arguments.base is not None else arguments.resume.info.base
    return folder, "" if arguments.saves_base else content_digest(Path(folder))


def remove_exported(options: CheckpointArguments, spared: Collection[Path]) -> None:
    """Remove checkpoints that were kept only until their export, after the last one of a run, except ``spared``."""
    interval = options.save_retain_interval
    if options.save is not None and interval is not None and options.save_hf_interval is not None:
        for path in (path for path in not_retained(Path(options.save), interval) if path not in spared):
            try:
                remove_checkpoint(path)
            except OSError as error:  # the run and its exports are complete
                print(f"{path} is exported and cannot be removed ({explain(error, path)}); remove it", flush=True)


def refuse_other_data(arguments: Arguments, dataset: PackedDataset) -> None:
    """Check that the data set fits the checkpoint.

    Raises:
        InputError: another vocabulary, or, unless ``--finetune`` starts a new pass, another data set.
    """
    if arguments.resume is None:
        return
    path, info = arguments.resume.path, arguments.resume.info
    # models from Hugging Face may have more rows in their vocabulary than their tokenizers have tokens
    if info.vocab_size != dataset.vocab_size and not (info.source and info.vocab_size > dataset.vocab_size):
        raise InputError(
            f"{path}: made for a vocabulary of {info.vocab_size}, the data set {arguments.data.data_path} has "
            f"{dataset.vocab_size}; preprocess the data with the model's tokenizer"
        )
    if not arguments.weights_alone and info.dataset_hash != dataset.dataset_hash:
        raise InputError(
            f"--load {path}: saved while training on another data set than --data-path {arguments.data.data_path}; "
            "continue with that one, or start a new pass from these weights with --finetune"
        )


def model_vocab_size(arguments: Arguments, dataset: PackedDataset) -> int:
    """Rows of the model's vocabulary; a model from Hugging Face may have more than the data set's tokenizer."""
    return dataset.vocab_size if arguments.resume is None else arguments.resume.info.vocab_size


def order_version(arguments: Arguments, dataset: PackedDataset) -> int:
    """Version of the order of packs: a new run takes that of the data set, one that resumes keeps its checkpoint's."""
    if arguments.resume is None or arguments.weights_alone:
        return dataset.entry.order_version
    return arguments.resume.info.order_version


def resume(
    arguments: Arguments, trainer: Trainer, log: RunLog, sources: Sources = NO_SOURCES
) -> tuple[Progress, RunState]:
    """Load the checkpoint of ``--load``, if there is one, and weights that it does not have from ``sources``.

    A run that resumes in its own folder gets back the best checkpoint of the step that it resumes from, since it will
    replace all that came later.

    Returns:
        the progress and the state of the run at that checkpoint.

    Raises:
        ValueError: a folder that the run reads is not in ``sources``.
    """
    state: RunState = {}
    if arguments.resume is None:
        return Progress(), state
    sources.check(arguments)
    path, info = arguments.resume.path, arguments.resume.info
    options = dataclasses.replace(arguments.checkpoint, finetune=arguments.weights_alone)
    if sources.model is not None:
        with contextlib.closing(sources.model):
            fill_weights(trainer, sources.model)
    elif arguments.base is not None:
        fill_weights(trainer, CheckpointSource(arguments.base.path, arguments.base.info))
    if arguments.base != arguments.resume:
        # a checkpoint has the state that Saver.save was given, as JSON-like values
        state = cast(RunState, checkpoint.load(path, trainer, info, options))
    if sources.adapter is not None and arguments.starts_from_adapter:
        fill_weights(trainer, sources.adapter, adapters=True)
    progress = Progress()
    if not options.finetune:
        progress = Progress(info.iteration, info.consumed_samples, info.skipped_steps)
    also = {"adapter": arguments.lora.hf_adapter} if arguments.starts_from_adapter else {}
    if arguments.base is not None and arguments.base != arguments.resume:
        also["base"] = str(arguments.base.path)
    log.write(event_record(progress, "load", path=str(path), finetune=options.finetune, **also))
    best = state["stopping"]["run"]["step"] if "stopping" in state else None
    if options.save is not None and path.resolve().parent == Path(options.save).resolve():
        if process_groups.is_main():
            restore_best(Path(options.save), best)
    elif best is not None:
        log.print(f"the best evaluation so far was at step {best}; a checkpoint of it is in {path.parent} alone")
    return progress, state


def keep_source(folder: Path, arguments: Arguments, sources: Sources) -> None:
    """Copy the files kept of a model from Hugging Face into the run folder, so that an export has them."""
    if arguments.resume is None or not arguments.resume.info.source:
        return
    target = folder / HUGGINGFACE
    if arguments.starts_from_hf and sources.model is not None:
        sources.model.keep(target)
        return
    source = arguments.resume.path.parent / HUGGINGFACE
    if source.is_dir() and source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True)


def keep_tokenizer(folder: Path, model: str, log: RunLog) -> None:
    """Copy the tokenizer's files into the run folder, so that an export is complete; print a line if they are gone."""
    if not copy_tokenizer(Path(model), folder / TOKENIZER):
        log.print(f"the tokenizer {model} is gone: an export of this run will need --tokenizer-model")

"""A whole run, from checked arguments to the last checkpoint.

::

    data set (refused here if it is damaged) ─► process groups ─► [whole checkpoint] ─► trainer ─► [load] ─► loop
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mft_megatron.arguments.completion import default_normalization
from mft_megatron.arguments.notes import notes
from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.storage.ledger import read_ledger
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.errors import InputError, disk_reported
from mft_megatron.mcore.model import kernels
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform import devices, environment
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder.configuration import effective_configuration
from mft_megatron.run_folder.names import CONFIG
from mft_megatron.run_folder.owner.owner import Owner
from mft_megatron.run_folder.replace_text import replace_text
from mft_megatron.run_folder.starts import begin_start

from .bad_steps.bad_steps import BadSteps, RollbackRequest
from .bad_steps.rollback import go_back
from .epochs import EpochProof
from .evaluation import Evaluation
from .loop import train
from .model_tokenizer import chat_format_line, check_model_tokenizer
from .progress import Progress
from .restarts.differences import digest_of_options
from .restarts.endings import Ending
from .run_log import RunLog
from .saving.data_order import model_vocab_size, refuse_other_data
from .saving.kept_files import keep_source, keep_tokenizer
from .saving.resume import agree_on_start, restore_tracker, resume
from .saving.run_state import RunState
from .saving.saver import Exports, Saver
from .saving.sources import NO_SOURCES, Sources
from .saving.whole_start import start_from_whole
from .shares.share_log import ShareLog
from .task_weights import data_weights_text
from .watchdog.limits import Limits
from .watchdog.watchdog import watching

HASHED_BYTES = 16 * 2**30


def pretrain(
    arguments: Arguments,
    main_rank: bool = True,
    sources: Sources = NO_SOURCES,
    exports: Exports | None = None,
    owner: Owner | None = None,
) -> Ending:
    """Train as the arguments say.

    Args:
        arguments: complete and checked.
        main_rank: whether this process is rank 0, which alone checks the content of the data set.
        sources: the folders of ``--hf-checkpoint`` and ``--hf-adapter``, opened.
        exports: exports the checkpoints of ``--save-hf-interval``; on rank 0 only.
        owner: ownership of the run folder, for a caller that does something with it afterwards: rank 0 acquires it
            here, and the caller gives it back. Otherwise it ends with the run.

    Returns:
        whether it is finished, or was saved and left.

    Raises:
        InputError: the data set, the tokenizer, the weights or the checkpoint cannot be used, training diverged, or
            another run owns the run folder.
    """
    with contextlib.ExitStack() as stack:
        if owner is None:
            owner = stack.enter_context(Owner(arguments.checkpoint.save or "."))
        stack.enter_context(_watched(arguments))
        return _pretrain(arguments, main_rank, sources, exports, owner)


def _watched(arguments: Arguments) -> contextlib.AbstractContextManager[None]:
    """Watch the progress of a run on this rank, within ``--stall-timeout`` and ``--start-timeout``."""
    layout, folder = arguments.distributed, arguments.checkpoint.save
    limits = Limits(60 * layout.stall_timeout, 60 * layout.start_timeout)
    rank = int(os.environ.get("RANK", 0))
    return watching(limits, rank, arguments.world_size, None if folder is None else Path(folder), _position_text)


def _position_text() -> str:
    return ", ".join(f"{name} rank {rank}" for name, rank in process_groups.position().items())


def _pretrain(arguments: Arguments, main_rank: bool, sources: Sources, exports: Exports | None, owner: Owner) -> Ending:
    dataset, checked = open_dataset(arguments, main_rank)
    model_lines = check_data_of_model(arguments, dataset, main_rank)
    evaluation = evaluation_of(arguments, dataset)
    if arguments.training.deterministic_mode:
        devices.make_deterministic()
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        options = arguments.checkpoint
        with _reported_on_all_ranks(), _run_folder_reported(arguments):
            if options.save is not None and process_groups.is_main():
                owner.acquire()
                if not arguments.validation.skip_train:
                    begin_start(options.save, arguments.progress[0], digest_of_options(arguments))
        agree_on_start(arguments)
        with _reported_on_all_ranks(), _run_folder_reported(arguments):
            log = RunLog(process_groups.is_main(), options.save, arguments.logging)
        try:
            log.print(f"{arguments.world_size} rank(s) on {devices.describe()}")
            if not checked:
                log.print("large data set: sizes of its files are checked, contents by tools/inspect_data.py --check")
            for line in filter(None, [environment.set_aside_attention(os.environ), *model_lines]):
                log.print(line)
            before, arguments = arguments, start_from_whole(arguments, sources.arguments_from, log)
            if arguments != before:
                check_data_of_model(arguments, dataset, main_rank)
                evaluation = evaluation_of(arguments, dataset)
            trainer = Trainer(arguments, model_vocab_size(arguments, dataset), len(dataset.tasks))
            lines = [
                _summary(arguments, dataset, trainer),
                _length(arguments, dataset.split("train").num_packs),
                kernels.describe(arguments, trainer.chunks[0].config),
                data_weights_text(arguments.multi_task, dataset.tasks, [task.weight for task in dataset.ledger.tasks]),
            ]
            for line in filter(None, lines):
                log.print(line)
            with _reported_on_all_ranks(), _run_folder_reported(arguments):
                if options.save is not None and process_groups.is_main():
                    _describe_run(Path(options.save), arguments, dataset, log, sources)
            progress, state = resume(arguments, trainer, log, sources)
            evaluation.load(state, log, progress)
            if arguments.validation.skip_train:
                evaluation.run(trainer, log, progress)
                return Ending(progress.step)
            on_gpu = devices.HAS_CUDA
            for note in notes(arguments, dataset.split("train").num_packs, "valid" in dataset.splits, on_gpu):
                log.print(f"note: {note}")
            saver = Saver(arguments, dataset, exports, owner)
            saver.rehearse(trainer, log)
            return _train(arguments, dataset, trainer, evaluation, saver, log, progress, state)
        finally:
            log.close()


def _train(
    arguments: Arguments,
    dataset: PackedDataset,
    trainer: Trainer,
    evaluation: Evaluation,
    saver: Saver,
    log: RunLog,
    progress: Progress,
    state: RunState,
) -> Ending:
    """Train from ``progress`` on, and after each rollback from the checkpoint that the run went back to."""
    while True:
        epochs, shares = EpochProof(arguments, dataset), ShareLog(arguments, dataset)
        bad_steps = BadSteps(arguments, dataset, saver.of_this_run)
        for part in (epochs, shares, bad_steps):
            part.load(state, log, progress)
        try:
            return train(arguments, dataset, trainer, evaluation, epochs, shares, bad_steps, saver, log, progress)
        except RollbackRequest as request:
            progress, state = go_back(arguments, trainer, log, request)
            saver.go_back(progress.step)
        evaluation = evaluation_of(arguments, dataset)
        evaluation.load(state, log, progress)


def open_dataset(arguments: Arguments, main_rank: bool) -> tuple[PackedDataset, bool]:
    """Open the data set and check it against its ledger: on rank 0 by content, on the others by the sizes of files.

    Rank 0 reads every byte, unless that would keep the others waiting for minutes. While the run reads the files, each
    rank looks at them now and then (:mod:`mft_megatron.data.storage.opened_files`).

    Returns:
        the data set, and whether it is small enough for its content to be checked.

    Raises:
        InputError: it is missing or damaged, or not packed for ``--seq-length``.
    """
    prefix = arguments.data.data_path
    small = sum(entry.size for entry in read_ledger(prefix).arrays.values()) <= HASHED_BYTES
    check = "hashes" if main_rank and small else "sizes"
    dataset = PackedDataset.open(prefix, arguments.data.seq_length, check)
    # one rank of each machine, which may have files of its own
    dataset.files.compares = os.environ.get("LOCAL_RANK", "0") == "0"
    return dataset, small


def check_data_of_model(arguments: Arguments, dataset: PackedDataset, main_rank: bool = True) -> list[str]:
    """Check that a data set belongs to the model and the checkpoint that a run starts from.

    Returns:
        lines for the log, on rank 0 alone.

    Raises:
        InputError: it was made with another tokenizer, or the checkpoint continues with another data set.
    """
    _check_tokenizer(arguments, dataset)
    lines = [check_model_tokenizer(arguments, dataset), chat_format_line(arguments, dataset)] if main_rank else []
    refuse_other_data(arguments, dataset)
    return [line for line in lines if line]


def evaluation_of(arguments: Arguments, dataset: PackedDataset) -> Evaluation:
    """Prepare the evaluations of a run, and check that the data set has all that its options need.

    Raises:
        InputError: a split, a task or a form of rows is missing.
    """
    _refuse_uneven_gathering(arguments, dataset)
    if arguments.validation.skip_train and "valid" not in dataset.splits:
        raise InputError(f"--skip-train: {dataset.prefix} has no validation split; preprocess it with --split 98,2,0")
    return Evaluation(arguments, dataset)


def _check_tokenizer(arguments: Arguments, dataset: PackedDataset) -> None:
    """Compare ``--tokenizer-type`` and the content of ``--tokenizer-model`` with the data set's tokenizer."""
    data, made_with = arguments.data, dataset.ledger.tokenizer
    if data.tokenizer_type is not None and data.tokenizer_type != made_with.type:
        raise InputError(
            f"--tokenizer-type {data.tokenizer_type}: {data.data_path} was made with {made_with.type}; leave it out"
        )
    if data.tokenizer_model is not None:
        fingerprint = load_tokenizer(made_with.type, data.tokenizer_model).fingerprint
        if fingerprint != made_with.fingerprint:
            raise InputError(
                f"--tokenizer-model {data.tokenizer_model}: its content differs from the tokenizer {data.data_path} "
                "was made with; preprocess the data with it, or leave the option out"
            )


def _refuse_uneven_gathering(arguments: Arguments, dataset: PackedDataset) -> None:
    """Refuse padded rows for experts that gather tokens of other ranks, which then must have equally many."""
    ranks, dispatcher = arguments.distributed.expert_model_parallel_size, arguments.moe.moe_token_dispatcher_type
    if dataset.padded and ranks > 1 and dispatcher == "allgather":
        raise InputError(
            f"--moe-token-dispatcher-type allgather with --expert-model-parallel-size {ranks}: rows of "
            f"{arguments.data.data_path} are padded, so ranks have different numbers of tokens; use alltoall"
        )


def _run_folder_reported(arguments: Arguments) -> contextlib.AbstractContextManager[None]:
    """Turn a run folder that the main process cannot write into a one-line error, before anything is trained."""
    folder, option = arguments.checkpoint.save, "--save"
    if folder is None:
        folder, option = arguments.logging.tensorboard_dir or ".", "--tensorboard-dir"
    return disk_reported(Path(folder), "nothing was trained", f"choose another {option}")


@contextlib.contextmanager
def _reported_on_all_ranks() -> Iterator[None]:
    """Raise an error of the main process on every rank, so that none waits for it; a collective of all ranks."""
    refusal: InputError | None = None
    try:
        yield
    except InputError as error:
        refusal = error
    process_groups.raise_on_all_ranks(refusal)


def _describe_run(folder: Path, arguments: Arguments, dataset: PackedDataset, log: RunLog, sources: Sources) -> None:
    """Write the configuration into the run folder, and copy into it what an export needs beside checkpoints."""
    restore_tracker(folder, arguments, log)
    replace_text(folder / CONFIG, effective_configuration(arguments.as_options(), arguments.world_size))
    keep_source(folder, arguments, sources)
    keep_tokenizer(folder, arguments.data.tokenizer_model or dataset.ledger.tokenizer.model, log)


def _length(arguments: Arguments, epoch_packs: int) -> str | None:
    """A line for the log: steps, packs and epochs of the whole run; none where nothing is trained."""
    if arguments.validation.skip_train:
        return None
    epochs, steps = arguments.training.num_train_epochs, arguments.training.train_iters
    if arguments.total_packs is not None:
        return f"--num-train-epochs {epochs:g}: {arguments.total_packs:,} packs, {steps:,} steps"
    before, consumed = arguments.progress
    packs = arguments.batch_sizes.consumed(consumed, max(steps - before, 0))
    return f"--train-iters {steps}: {packs:,} packs, {packs / epoch_packs:.2f} epochs"


def _summary(arguments: Arguments, dataset: PackedDataset, trainer: Trainer) -> str:
    """A line for the log: parameters, parallel layout, tasks and objective."""
    layout = arguments.distributed
    stages = f" × VPP {layout.num_virtual_stages_per_pipeline_rank}" if layout.interleaved else ""
    context = f" × CP {layout.context_parallel_size}" if layout.context_parallel_size > 1 else ""
    experts = layout.expert_model_parallel_size
    over_experts = f" (experts over {experts})" if experts > 1 else ""
    adapters = ""
    if arguments.adapters is not None:
        adapters = f", {trainer.num_parameters(trained=True):,} of them trained: {arguments.adapters.describe()}"
    return (
        f"{trainer.num_parameters():,} parameters{adapters}; TP {layout.tensor_model_parallel_size} × PP "
        f"{layout.pipeline_model_parallel_size}{stages}{context} × DP {arguments.data_parallel_size}{over_experts}; "
        f"{len(dataset.tasks)} task{'s' if len(dataset.tasks) > 1 else ''} in "
        f"{dataset.split('train').num_packs:,} training packs of {arguments.data.seq_length}; "
        f"objective {_objective(arguments)}"
    )


def _objective(arguments: Arguments) -> str:
    """The objective in words: loss, normalisation with where it comes from, source of the weights."""
    options = arguments.multi_task
    default, origin = default_normalization(arguments)
    origin = f" ({origin})" if options.mft_normalization == default else ""
    return f"{options.mft_loss}, normalisation {options.mft_normalization}{origin}, weights {options.task_balance}"

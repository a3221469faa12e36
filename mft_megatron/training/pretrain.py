"""A whole run, from checked arguments to the last checkpoint.

::

    data set (refused here if it is not whole) ─► process groups ─► trainer ─► [checkpoint] ─► loop
"""

from pathlib import Path
from typing import Any

from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.storage.ledger import read_ledger
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.errors import InputError
from mft_megatron.mcore.model import kernels
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder import CONFIG, effective_configuration, replace_text

from .epochs import EpochProof
from .evaluation import Evaluation
from .loop import train
from .model_tokenizer import check_model_tokenizer
from .run_log import RunLog
from .saving import NO_SOURCES, Saver, Sources, keep_source, keep_tokenizer, model_vocab_size, refuse_other_data, resume
from .task_weights import data_weights_text

HASHED_BYTES = 16 * 2**30


def pretrain(arguments: Arguments, main_rank: bool = True, sources: Sources = NO_SOURCES, exports: Any = None) -> None:
    """Train as the arguments say.

    Args:
        arguments: complete and checked.
        main_rank: whether this process is rank 0, which alone checks the content of the data set.
        sources: what ``--hf-checkpoint`` and ``--hf-adapter`` name.
        exports: takes the checkpoints of ``--save-hf-interval``, see :class:`.saving.Saver`; on rank 0 alone.

    Raises:
        InputError: the data set, the tokenizer, the weights or the checkpoint cannot be used, or training diverged.
    """
    dataset, checked = open_dataset(arguments, main_rank)
    _check_tokenizer(arguments, dataset)
    of_model = check_model_tokenizer(arguments, dataset) if main_rank else ""
    refuse_other_data(arguments, dataset)
    _refuse_uneven_gathering(arguments, dataset)
    if arguments.validation.skip_train and "valid" not in dataset.splits:
        raise InputError(f"--skip-train: {dataset.prefix} has no validation split; preprocess it with --split 98,2,0")
    evaluation = Evaluation(arguments, dataset)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        options = arguments.checkpoint
        log = RunLog(process_groups.is_main(), options.save, arguments.logging)
        try:
            log.print(f"{arguments.world_size} rank(s) on {devices.describe()}")
            if not checked:
                log.print("large data set: sizes of its files are checked, contents by tools/inspect_data.py --check")
            if of_model:
                log.print(of_model)
            trainer = Trainer(arguments, model_vocab_size(arguments, dataset), len(dataset.tasks))
            log.print(_shape(arguments, dataset, trainer))
            log.print(kernels.describe(arguments, trainer.chunks[0].config))
            of_data = data_weights_text(
                arguments.multi_task, dataset.tasks, [task.weight for task in dataset.ledger.tasks]
            )
            if of_data is not None:
                log.print(of_data)
            if options.save is not None and process_groups.is_main():
                _describe_run(arguments, dataset, log, sources)
            progress, state = resume(arguments, trainer, log, sources)
            evaluation.load(state, log, progress)
            if arguments.validation.skip_train:
                evaluation.run(trainer, log, progress)
                return
            epochs = EpochProof(arguments, dataset)
            epochs.load(state, log, progress)
            saver = Saver(arguments, dataset, exports)
            train(arguments, dataset, trainer, evaluation, epochs, saver, log, progress)
        finally:
            log.close()


def open_dataset(arguments: Arguments, main_rank: bool) -> tuple[PackedDataset, bool]:
    """The data set, and whether its content, not only the sizes of its files, agrees with its ledger as far as this
    process is to say: rank 0 reads every byte, unless that would keep the others waiting for minutes."""
    prefix = arguments.data.data_path
    small = sum(entry.size for entry in read_ledger(prefix).arrays.values()) <= HASHED_BYTES
    check = "hashes" if main_rank and small else "sizes"
    return PackedDataset.open(prefix, arguments.data.seq_length, check), small


def _check_tokenizer(arguments: Arguments, dataset: PackedDataset) -> None:
    """Compare ``--tokenizer-model``, where it is given, with the data set's tokenizer by content."""
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
    """Experts' ranks gather as many tokens of each other as they have, and micro-batches of padded rows differ."""
    ranks, dispatcher = arguments.distributed.expert_model_parallel_size, arguments.moe.moe_token_dispatcher_type
    if dataset.padded and ranks > 1 and dispatcher == "allgather":
        raise InputError(
            f"--moe-token-dispatcher-type allgather with --expert-model-parallel-size {ranks}: rows of "
            f"{arguments.data.data_path} are padded, so ranks have different numbers of tokens; use alltoall"
        )


def _describe_run(arguments: Arguments, dataset: PackedDataset, log: RunLog, sources: Sources) -> None:
    folder = Path(arguments.checkpoint.save)
    replace_text(folder / CONFIG, effective_configuration(arguments.as_options(), arguments.world_size))
    keep_source(arguments, sources)
    keep_tokenizer(str(folder), arguments.data.tokenizer_model or dataset.ledger.tokenizer.model, log)


def _shape(arguments: Arguments, dataset: PackedDataset, trainer: Trainer) -> str:
    layout = arguments.distributed
    virtual = f" × VPP {layout.num_virtual_stages_per_pipeline_rank}" if layout.interleaved else ""
    experts = layout.expert_model_parallel_size
    shared = f" (experts over {experts})" if experts > 1 else ""
    context = f" × CP {layout.context_parallel_size}" if layout.context_parallel_size > 1 else ""
    adapters = ""
    if arguments.adapters is not None:
        adapters = f", {trainer.num_parameters(trained=True):,} of them trained: {arguments.adapters.describe()}"
    return (
        f"{trainer.num_parameters():,} parameters{adapters}; TP {layout.tensor_model_parallel_size} × PP "
        f"{layout.pipeline_model_parallel_size}{virtual}{context} × DP {arguments.data_parallel_size}{shared}; "
        f"{len(dataset.tasks)} tasks in {dataset.split('train').num_packs:,} training packs of "
        f"{arguments.data.seq_length}; objective {arguments.multi_task.mft_loss}, weights "
        f"{arguments.multi_task.task_balance}"
    )

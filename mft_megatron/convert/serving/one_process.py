"""A model in one process, without training: the arguments that build it and the source of its weights."""

import dataclasses
from pathlib import Path

from mft_megatron.arguments.command import CommandLine, make_arguments
from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.start import Start, find_checkpoint
from mft_megatron.arguments.table import Arguments
from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
from mft_megatron.mcore.checkpointing.weight_source import CheckpointSource, WeightSource
from mft_megatron.options import Given
from mft_megatron.run_folder import CheckpointRef

# what a run needs and a forward pass does not use; no dropout, and no padding of the vocabulary
FORWARD_ONLY: Given = {
    "micro_batch_size": 1,
    "train_iters": 1,
    "lr": 1.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "make_vocab_size_divisible_by": 1,
}


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model that can be built in this process.

    Attributes:
        arguments: complete and checked, for one process.
        vocab_size: tokens of the vocabulary, without padding.
        source: where weights are read from.
    """

    arguments: Arguments
    vocab_size: int
    source: WeightSource


def open_model(folder: Path | None, checkpoint: CheckpointRef | None, dtype: str, given: Given) -> OpenedModel:
    """Open a Hugging Face folder, read as ``--hf-checkpoint`` reads it, or a checkpoint, which replaces it.

    Args:
        folder: of the model; not read where there is a checkpoint.
        checkpoint: of a model without adapters.
        dtype: precision of the model: fp32, bf16 or fp16.
        given: further options of ``pretrain_mft.py`` by field: ``data_path``, ``seq_length`` and such.

    Raises:
        InputError: the model is not supported, does not fit the options, or its files are damaged.
    """
    given = {**FORWARD_ONLY, **({} if dtype == "fp32" else {dtype: True}), **given}
    if checkpoint is not None:
        command_line = CommandLine({**given, "finetune": True, "load": str(checkpoint.path)}, frozenset())
        arguments = make_arguments(command_line, Start(find_checkpoint(command_line.group(CheckpointArguments))))
        source = CheckpointSource(checkpoint.path, checkpoint.info)
        return OpenedModel(arguments, checkpoint.info.vocab_size, source)
    if folder is None:
        raise ValueError("neither a folder nor a checkpoint")
    opened = HuggingFaceSource(folder)
    command_line = CommandLine({**given, "hf_checkpoint": str(folder)}, frozenset())
    return OpenedModel(make_arguments(command_line, Start(hf_model=opened.info)), opened.info.vocab_size, opened)

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
from mft_megatron.run_folder.description import CheckpointRef

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
        adapters: where those of its adapters are read from; ``None`` where it has none.
    """

    arguments: Arguments
    vocab_size: int
    source: WeightSource
    adapters: WeightSource | None = None


def open_model(folder: Path | None, checkpoint: CheckpointRef | None, dtype: str, given: Given) -> OpenedModel:
    """Open a Hugging Face folder, read as ``--hf-checkpoint`` reads it, or a checkpoint, which takes precedence.

    Args:
        folder: of the model; beside a checkpoint that holds only adapters, of the model that they belong to.
        checkpoint: with or without adapters.
        dtype: precision of the model: fp32, bf16 or fp16.
        given: further options of ``pretrain_mft.py`` by field: ``data_path``, ``seq_length`` and such.

    Raises:
        InputError: the model is not supported, does not fit the options, or its files are damaged.
    """
    given = {**FORWARD_ONLY, **({} if dtype == "fp32" else {dtype: True}), **given}
    if checkpoint is not None:
        given |= {"finetune": True, "load": str(checkpoint.path)}
    opened = None
    if folder is not None and (checkpoint is None or not checkpoint.info.has_base):
        opened = HuggingFaceSource(folder)
        given |= {"hf_checkpoint": str(folder)}
    command_line = CommandLine(given, frozenset())
    found = find_checkpoint(command_line.group(CheckpointArguments))
    arguments = make_arguments(command_line, Start(found, None if opened is None else opened.info))
    if checkpoint is None and opened is not None:
        return OpenedModel(arguments, opened.info.vocab_size, opened)
    if checkpoint is None:
        raise ValueError("neither a folder nor a checkpoint")
    own = CheckpointSource(checkpoint.path, checkpoint.info)
    return OpenedModel(
        arguments, checkpoint.info.vocab_size, opened or own, own if checkpoint.info.lora is not None else None
    )

"""A run folder with one checkpoint that was converted, not trained: what ``--load`` starts a run from."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.atomic_folder import replacing
from mft_megatron.mcore.checkpointing.tensor_writer import Weight, write_weights
from mft_megatron.mcore.checkpointing.weight_source import WeightSlice, WeightSource
from mft_megatron.mcore.platform.precisions import BY_DTYPE
from mft_megatron.run_folder.description import CheckpointInfo, write_info
from mft_megatron.run_folder.manifest import write_manifest
from mft_megatron.run_folder.names import HUGGINGFACE, TRACKER, iteration_folder
from mft_megatron.run_folder.replace_text import replace_text
from mft_megatron.run_folder.verification import DESCRIPTION, copied_description

FILE_BYTES = 512 * 2**20


def describe(source: str, architecture: NetworkArguments, vocab_size: int, dtype: torch.dtype) -> CheckpointInfo:
    """Describe a model that was not trained here.

    Args:
        source: the Hugging Face architecture that it came as.
        vocab_size: tokens, without padding.
    """
    return CheckpointInfo(
        iteration=0,
        consumed_samples=0,
        architecture=dataclasses.asdict(architecture),
        vocab_size=vocab_size,
        tokenizer={},
        dataset_hash="",
        seed=0,
        global_batch_size=0,
        has_optimizer=False,
        has_rng=False,
        precision=BY_DTYPE[dtype].name,
        source=source,
    )


def write_checkpoint(
    target: Path,
    info: CheckpointInfo,
    weights: Mapping[str, Weight],
    slices: Sequence[WeightSlice],
    source: WeightSource,
    keep: Callable[[Path], None],
) -> None:
    """Write a new run folder with a checkpoint of iteration 0; the description is the last file of the checkpoint.

    Args:
        target: folder to create; must not exist, or be empty.
        info: description of the checkpoint.
        weights: the weights by name.
        slices: a partition of every weight, in the order in which they are read.
        source: the content of the slices, in their weight's dtype.
        keep: writes into a folder what an export gives back besides weights.

    Raises:
        OSError: a file cannot be written.
    """
    with replacing(target) as partial:
        path = iteration_folder(partial, 0)
        path.mkdir()
        common: dict[str, object] = {DESCRIPTION: copied_description(info)}
        files = write_weights(path, weights, slices, source, FILE_BYTES, common)
        keep(partial / HUGGINGFACE)
        write_info(path, dataclasses.replace(info, manifest=write_manifest(path, files)))
        replace_text(partial / TRACKER, "0\n")

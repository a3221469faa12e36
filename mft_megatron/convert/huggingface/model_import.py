"""Import of a Hugging Face folder: a Megatron-Core distributed checkpoint, which any parallel layout loads.

::

    config.json ─► family, architecture ─► slices of Megatron-Core's weights ─► rows of Hugging Face's ─► checkpoint

Weights stream through memory a slice at a time. The folder is written beside its final path and renamed when it is
complete; within it the checkpoint's description is written last.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from mft_megatron.convert.atomic_folder import refuse_content
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.tensor_writer import Weight
from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from mft_megatron.mcore.platform.precisions import BY_DTYPE

from .converted_checkpoint import write_checkpoint
from .mapped_weight import MappedWeight, names_of
from .safetensors_reader import BLOCK_BYTES
from .weight_source import HuggingFaceSource


def import_model(folder: Path, target: Path) -> HuggingFaceSource:
    """Write the model of a Hugging Face folder into the new run folder ``target``, in this process alone.

    Returns:
        the model, closed; its ``info`` describes the checkpoint.

    Raises:
        InputError: the architecture is not supported, a weight is missing, left over, damaged or of another shape than
            ``config.json`` says, or ``target`` has content.
    """
    refuse_content(target, "--save")
    with contextlib.closing(HuggingFaceSource(folder)) as source:
        weights = {weight.name: _stacked(weight, source) for weight in source.mapped}
        write_checkpoint(target, source.info, weights, list(_slices(source, weights)), source, source.keep)
    return source


def _stacked(weight: MappedWeight, source: HuggingFaceSource) -> Weight:
    """The checkpoint's weight, with all layers and experts."""
    dtypes = {source.files.weights[name].dtype for name in names_of([weight], source.architecture)}
    if len(dtypes) > 1:
        listed = " and ".join(sorted(BY_DTYPE[dtype].safetensors for dtype in dtypes))
        raise InputError(f"{source.folder}: {weight.hf_names[0]} and its like are {listed}; use one")
    return Weight(weight.name, (*weight.stack(source.architecture), *weight.shape(source.sizes)), dtypes.pop())


def _slices(source: HuggingFaceSource, weights: Mapping[str, Weight]) -> Iterator[WeightSlice]:
    """Slices of all weights, layer by layer, so that files are read mostly from beginning to end."""
    by_layer = [
        (index[:1], position, index)
        for position, weight in enumerate(source.mapped)
        for index in weight.indices(source.architecture)
    ]
    for _, position, index in sorted(by_layer):
        weight = source.mapped[position]
        shape = weight.shape(source.sizes)
        row_bytes = math.prod(shape[1:]) * weights[weight.name].dtype.itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            yield WeightSlice(weight.name, index, (first, *(0 for _ in shape[1:])), (count, *shape[1:]))

"""Import of a Hugging Face folder: a Megatron-Core distributed checkpoint, which any parallel layout loads.

::

    config.json ─► family, architecture ─► slices of Megatron-Core's weights ─► rows of Hugging Face's ─► checkpoint

Weights stream through memory a slice at a time. The folder is written beside its final path and renamed when it is
complete; within it the checkpoint's description is written last.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.atomic_folder import refuse_content
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.tensor_writer import Weight
from mft_megatron.mcore.checkpointing.vocabulary import EMBEDDING, OUTPUT_LAYER
from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from mft_megatron.mcore.platform.precisions import BY_DTYPE, model_dtype
from mft_megatron.run_folder import CheckpointInfo

from .converted_checkpoint import describe, write_checkpoint
from .family import Family
from .mapped_source import MappedSource
from .mapped_weight import MappedWeight, names_of
from .model_folder import copy_kept_files, read_architecture
from .row_layouts import Sizes, sizes_of
from .safetensors_reader import BLOCK_BYTES, WeightFiles, same_content

# Buffers that old versions of transformers stored although they follow from the configuration.
COMPUTED_BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


def import_model(source: Path, target: Path) -> tuple[Family, CheckpointInfo]:
    """Write the model of the Hugging Face folder ``source`` into the new run folder ``target``, in this process alone.

    Returns:
        the model's family and the description of the checkpoint.

    Raises:
        InputError: the architecture is not supported, a weight is missing, left over, damaged or of another shape than
            ``config.json`` says, or ``target`` has content.
    """
    refuse_content(target, "--save")
    family, architecture, vocab_size = read_architecture(source)
    with contextlib.closing(WeightFiles(source)) as files:
        return family, _convert(source, target, files, family, architecture, vocab_size)


def _convert(
    source: Path, target: Path, files: WeightFiles, family: Family, architecture: NetworkArguments, vocab_size: int
) -> CheckpointInfo:
    refuse_mismatch(files, family, architecture, vocab_size)
    mapped, sizes = family.weights(architecture), sizes_of(architecture, vocab_size)
    weights = {weight.name: _stacked(weight, architecture, sizes, files) for weight in mapped}
    info = describe_folder(files, family, architecture, vocab_size)
    slices = list(_slices(mapped, architecture, weights, sizes))
    content = MappedSource(files, mapped, sizes)
    write_checkpoint(target, info, weights, slices, content, functools.partial(copy_kept_files, source))
    return info


def refuse_mismatch(files: WeightFiles, family: Family, architecture: NetworkArguments, vocab_size: int) -> None:
    """Check that a folder holds exactly the weights of its architecture.

    Raises:
        InputError: a weight is missing, unknown, or of another shape.
    """
    mapped, sizes = family.weights(architecture), sizes_of(architecture, vocab_size)
    expected = names_of(mapped, architecture)
    if missing := sorted(expected - files.weights.keys()):
        raise InputError(f"{files.folder}: {_some(missing)} missing; download the model again")
    unknown = {name for name in files.weights.keys() - expected if not name.endswith(COMPUTED_BUFFERS)}
    if architecture.tie_embeddings:
        unknown -= _tied_outputs(files, family, architecture)
    if unknown:
        raise InputError(
            f"{files.folder}: {_some(sorted(unknown))} not known in this architecture; the model is of another one"
        )
    for weight in mapped:
        for index in weight.indices(architecture):
            for name, shape in zip(weight.hf_names_at(index), weight.hf_shapes(sizes), strict=True):
                stored = files.weights[name].shape
                if stored != shape:
                    raise InputError(
                        f"{files.folder}: {name} has the shape {list(stored)}, config.json says {list(shape)}; they "
                        "are of different models"
                    )


def _tied_outputs(files: WeightFiles, family: Family, architecture: NetworkArguments) -> set[str]:
    """Output layers that a folder stores although they are the embedding's weight.

    Raises:
        InputError: the output layer is not the embedding's weight.
    """
    untied = family.weights(dataclasses.replace(architecture, tie_embeddings=False))
    hf_names = {weight.name: weight.hf_names for weight in untied}
    embedding = hf_names[EMBEDDING][0]
    stored = {name for name in hf_names[OUTPUT_LAYER] if name in files.weights}
    for output in stored:
        if not same_content(files, output, files, embedding):
            raise InputError(
                f"{files.folder}: config.json ties the embeddings, but {output} differs from {embedding}; set "
                "tie_word_embeddings to what the model was trained with"
            )
    return stored


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


def _stacked(weight: MappedWeight, architecture: NetworkArguments, sizes: Sizes, files: WeightFiles) -> Weight:
    """The checkpoint's weight, with all layers and experts."""
    names = names_of([weight], architecture)
    dtypes = {files.weights[name].dtype for name in names}
    if len(dtypes) > 1:
        listed = " and ".join(sorted(BY_DTYPE[dtype].safetensors for dtype in dtypes))
        raise InputError(f"{files.folder}: {weight.hf_names[0]} and its like are {listed}; use one")
    return Weight(weight.name, (*weight.stack(architecture), *weight.shape(sizes)), dtypes.pop())


def describe_folder(
    files: WeightFiles, family: Family, architecture: NetworkArguments, vocab_size: int
) -> CheckpointInfo:
    """Describe the model of a Hugging Face folder; its precision is that of its largest weight."""
    sizes = sizes_of(architecture, vocab_size)
    dtype = model_dtype(
        ((*weight.stack(architecture), *weight.shape(sizes)), files.weights[weight.hf_names[0].format(0, 0)].dtype)
        for weight in family.weights(architecture)
    )
    return describe(family.architecture, architecture, vocab_size, dtype)


def _slices(
    mapped: Sequence[MappedWeight], architecture: NetworkArguments, weights: Mapping[str, Weight], sizes: Sizes
) -> Iterator[WeightSlice]:
    """Slices of all weights, layer by layer, so that files are read mostly from beginning to end."""
    by_layer = [
        (index[:1], position, index) for position, weight in enumerate(mapped) for index in weight.indices(architecture)
    ]
    for _, position, index in sorted(by_layer):
        weight = mapped[position]
        shape = weight.shape(sizes)
        row_bytes = math.prod(shape[1:]) * weights[weight.name].dtype.itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            yield WeightSlice(weight.name, index, (first, *(0 for _ in shape[1:])), (count, *shape[1:]))

"""A Hugging Face folder as a Megatron-Core distributed checkpoint, which any layout loads.

::

    config.json ─► family, architecture ─► slices of Megatron-Core's weights ─► rows of Hugging Face's ─► checkpoint

Weights stream through memory a slice at a time. The folder is written beside its final place and renamed when it is
whole; within it the checkpoint's description comes last.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.atomic_folder import refuse_content, replacing
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.tensor_writer import Weight, write_weights
from mft_megatron.mcore.checkpointing.vocabulary import EMBEDDING
from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from mft_megatron.mcore.platform.precisions import BY_DTYPE, model_dtype
from mft_megatron.run_folder import HUGGINGFACE, TRACKER, CheckpointInfo, iteration_folder, replace_text, write_info

from .family import Family, Row, names_of, places
from .model_folder import copy_kept_files, read_architecture
from .row_layouts import Sizes, sizes_of
from .row_source import RowSource
from .safetensors_reader import BLOCK_BYTES, WeightFiles, same_content

FILE_BYTES = 512 * 2**20
OUTPUTS = {"lm_head.weight", "embed_out.weight"}
# What old versions of transformers stored although it follows from the configuration.
FOLLOWS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


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
    rows, sizes = family.rows(architecture), sizes_of(architecture, vocab_size)
    refuse_mismatch(files, rows, architecture, sizes)
    weights = {row.ours: _weight(row, architecture, sizes, files) for row in rows}
    info = describe(family.architecture, architecture, vocab_size, stored_dtype(files, rows, architecture, sizes))
    with replacing(target) as partial:
        path = iteration_folder(partial, 0)
        path.mkdir()
        slices = list(_slices(rows, architecture, weights, sizes))
        write_weights(path, weights, slices, RowSource(files, rows, sizes), FILE_BYTES)
        copy_kept_files(source, partial / HUGGINGFACE)
        write_info(path, info)
        replace_text(partial / TRACKER, "0\n")
    return info


def refuse_mismatch(files: WeightFiles, rows: Sequence[Row], architecture: NetworkArguments, sizes: Sizes) -> None:
    """Check that a folder holds exactly the weights of its architecture.

    Raises:
        InputError: one is missing, unknown, or of another shape.
    """
    expected = names_of(rows, architecture)
    if missing := sorted(expected - files.weights.keys()):
        raise InputError(f"{files.folder}: {_some(missing)} missing; download the model again")
    extra = {name for name in files.weights.keys() - expected if not name.endswith(FOLLOWS)}
    for output in extra & OUTPUTS if architecture.tie_embeddings else ():
        extra.remove(output)
        embedding = next(row for row in rows if row.ours == EMBEDDING).theirs[0]
        if not same_content(files, output, files, embedding):
            raise InputError(
                f"{files.folder}: config.json ties the embeddings, but {output} differs from {embedding}; set "
                "tie_word_embeddings to what the model was trained with"
            )
    if extra:
        raise InputError(
            f"{files.folder}: {_some(sorted(extra))} not known in this architecture; the model is of another one"
        )
    for row in rows:
        shapes = row.their_shapes(sizes)
        for place in places(row, architecture):
            for name, shape in zip(row.theirs, shapes, strict=True):
                found = files.weights[name.format(*place)].shape
                if found != shape:
                    raise InputError(
                        f"{files.folder}: {name.format(*place)} has the shape {list(found)}, config.json says "
                        f"{list(shape)}; they are of different models"
                    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


def _weight(row: Row, architecture: NetworkArguments, sizes: Sizes, files: WeightFiles) -> Weight:
    """The checkpoint's weight for a row, all layers and experts together."""
    dtypes = {files.weights[name.format(*place)].dtype for place in places(row, architecture) for name in row.theirs}
    if len(dtypes) > 1:
        listed = " and ".join(sorted(BY_DTYPE[dtype].safetensors for dtype in dtypes))
        raise InputError(f"{files.folder}: {row.theirs[0]} and its like are {listed}; use one")
    return Weight(row.ours, (*row.stack(architecture), *row.shape(sizes)), dtypes.pop())


def stored_dtype(files: WeightFiles, rows: Sequence[Row], architecture: NetworkArguments, sizes: Sizes) -> torch.dtype:
    """Dtype of a folder's model as a whole: that of its largest weight, all layers and experts together."""
    return model_dtype(
        ((*row.stack(architecture), *row.shape(sizes)), files.weights[row.theirs[0].format(0, 0)].dtype) for row in rows
    )


def describe(source: str, architecture: NetworkArguments, vocab_size: int, dtype: torch.dtype) -> CheckpointInfo:
    """The description of a model that has no run behind it; ``source``: what it came as."""
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


def _slices(
    rows: Sequence[Row], architecture: NetworkArguments, weights: dict[str, Weight], sizes: Sizes
) -> Iterator[WeightSlice]:
    """Slices of all weights, layer by layer, so that files are read mostly from beginning to end."""
    in_order = [(place[:1], number, place) for number, row in enumerate(rows) for place in places(row, architecture)]
    for _, number, place in sorted(in_order):
        row = rows[number]
        shape = row.shape(sizes)
        row_bytes = math.prod(shape[1:]) * weights[row.ours].dtype.itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            yield WeightSlice(row.ours, place, (first, *(0 for _ in shape[1:])), (count, *shape[1:]))

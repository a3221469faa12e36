"""A distributed checkpoint of a model's weights, written by one process without a model, a few pieces at a time.

Megatron-Core's ``torch_dist`` checkpoints are checkpoints of ``torch.distributed.checkpoint``. Its writer is told which
pieces there will be, and asks for each when it is its turn; Megatron-Core's two small files stand beside.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of the checkpoint; layers, and experts, of a kind are stacked along the first axes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rectangle of a weight: ``offset`` and ``shape`` on all its axes."""

    weight: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def write_weights(
    path: Path,
    weights: Mapping[str, Weight],
    pieces: Sequence[Piece],
    read: Callable[[Piece], Tensor],
    file_bytes: int,
) -> None:
    """Write the checkpoint ``path``, an existing, empty folder.

    Args:
        pieces: together all of every weight, in the order in which they are asked for.
        read: the content of a piece, on the CPU, of its shape and its weight's dtype.
        file_bytes: a file is ended before a piece that would make it larger. Memory is that of one file's pieces.

    Raises:
        OSError: a file cannot be written.
    """
    writer = FileSystemWriter(path)
    writer.set_up_storage_writer(is_coordinator=True)
    planner = _PiecePlanner(pieces, read)
    plans = [SavePlan([_item(piece, weights) for piece in group]) for group in _files(pieces, weights, file_bytes)]
    with warnings.catch_warnings():
        # torch's writer announces the successor of what it uses itself
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        try:
            written = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
        except RuntimeError as error:
            # on a full disk torch.save complains of what it has not written, over the error that says why
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    torch.save({}, path / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(path))
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in weights}
    for piece in pieces:
        chunks[piece.weight].append(_chunk(piece))
    content = {
        name: TensorStorageMetadata(TensorProperties(weight.dtype), torch.Size(weight.shape), chunks[name])
        for name, weight in weights.items()
    }
    writer.finish(Metadata(content), written)


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))


def _item(piece: Piece, weights: Mapping[str, Weight]) -> WriteItem:
    weight = weights[piece.weight]
    data = TensorWriteData(_chunk(piece), TensorProperties(weight.dtype), torch.Size(weight.shape))
    return WriteItem(MetadataIndex(piece.weight, piece.offset), WriteItemType.SHARD, tensor_data=data)


def _files(pieces: Iterable[Piece], weights: Mapping[str, Weight], file_bytes: int) -> Iterable[list[Piece]]:
    """The pieces of each file."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        more = math.prod(piece.shape) * weights[piece.weight].dtype.itemsize
        if group and size + more > file_bytes:
            yield group
            group, size = [], 0
        group.append(piece)
        size += more
    if group:
        yield group


class _PiecePlanner(SavePlanner):
    """Hands torch's writer each piece when it asks for it."""

    def __init__(self, pieces: Iterable[Piece], read: Callable[[Piece], Tensor]):
        self._pieces = {(piece.weight, piece.offset): piece for piece in pieces}
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        piece = self._pieces[write_item.index.fqn, tuple(write_item.index.offset)]
        content = self._read(piece)
        if tuple(content.shape) != piece.shape:
            raise ValueError(f"{piece}: was given {tuple(content.shape)}")
        return content

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        raise NotImplementedError("made with its pieces")

    def create_local_plan(self):
        raise NotImplementedError("made with its pieces")

    def create_global_plan(self, all_plans):
        raise NotImplementedError("made with its pieces")

    def finish_plan(self, new_plan):
        raise NotImplementedError("made with its pieces")

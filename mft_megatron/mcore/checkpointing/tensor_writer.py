"""Write a distributed checkpoint of a model's weights from one process without a model, a few slices at a time.

Megatron-Core's ``torch_dist`` checkpoints are checkpoints of ``torch.distributed.checkpoint``. torch's writer is given
the list of slices and asks for the content of each when it writes it; Megatron-Core's two small files are written
beside.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from mft_megatron.common_state import COMMON
from mft_megatron.disk_errors import disk_error
from mft_megatron.run_folder.file_hash import FileHash, hash_file
from mft_megatron.run_folder.files import FORMAT

from .common_state import write_common
from .finite import refuse_to_write
from .weight_source import WeightSlice, WeightSource
from .writers.hashed_files import HashedFileSystem


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of the checkpoint; layers, and experts, of a kind are stacked along the first axes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_weights(
    path: Path,
    weights: Mapping[str, Weight],
    slices: Sequence[WeightSlice],
    source: WeightSource,
    file_bytes: int,
    common: dict[str, object] | None = None,
) -> Mapping[str, FileHash]:
    """Write the checkpoint ``path``, an existing, empty folder.

    Args:
        path: the folder of the checkpoint.
        weights: the weights by name.
        slices: a partition of every weight, in the order in which they are read.
        source: the content of the slices, in their weight's dtype.
        file_bytes: bytes after which a new file is begun. Memory is that of one file's slices.
        common: the common state: numbers, texts, lists and dicts; empty by default.

    Returns:
        size and hashes of the files by name.

    Raises:
        InputError: an element of a weight is NaN or infinite.
        OSError: a file cannot be written.
    """
    files: dict[str, FileHash] = {}
    writer = FileSystemWriter(path)
    writer.fs = HashedFileSystem(files)
    writer.set_up_storage_writer(is_coordinator=True)
    planner = _SlicePlanner(slices, source)
    plans = [SavePlan([_item(part, weights) for part in group]) for group in _files(slices, weights, file_bytes)]
    with warnings.catch_warnings():
        # torch's writer warns about a torch API that it uses itself
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        try:
            written = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
        except RuntimeError as error:
            # on a full disk torch.save raises its own error over the OSError that names the cause
            raise disk_error(error) or error from None
    files[COMMON] = write_common(common or {}, path)
    save_config(CheckpointingConfig("torch_dist", 1), str(path))
    files[FORMAT] = hash_file(path / FORMAT)
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in weights}
    for part in slices:
        chunks[part.name].append(_chunk(part))
    content: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        name: TensorStorageMetadata(TensorProperties(weight.dtype), torch.Size(weight.shape), chunks[name])
        for name, weight in weights.items()
    }
    writer.finish(Metadata(content), written)
    return files


def _chunk(part: WeightSlice) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.stacked_shape))


def _item(part: WeightSlice, weights: Mapping[str, Weight]) -> WriteItem:
    weight = weights[part.name]
    data = TensorWriteData(_chunk(part), TensorProperties(weight.dtype), torch.Size(weight.shape))
    return WriteItem(MetadataIndex(part.name, part.offset), WriteItemType.SHARD, tensor_data=data)


def _files(
    slices: Iterable[WeightSlice], weights: Mapping[str, Weight], file_bytes: int
) -> Iterator[list[WeightSlice]]:
    """The slices of each file."""
    group: list[WeightSlice] = []
    size = 0
    for part in slices:
        more = math.prod(part.shape) * weights[part.name].dtype.itemsize
        if group and size + more > file_bytes:
            yield group
            group, size = [], 0
        group.append(part)
        size += more
    if group:
        yield group


class _SlicePlanner(SavePlanner):
    """Gives torch's writer the content of each slice when it asks for it."""

    def __init__(self, slices: Iterable[WeightSlice], source: WeightSource):
        self._slices = {(part.name, part.offset): part for part in slices}
        self._source = source

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        part = self._slices[write_item.index.fqn, tuple(write_item.index.offset or ())]
        content = self._source.read(part)
        if tuple(content.shape) != part.shape:
            raise ValueError(f"{part}: the content has the shape {tuple(content.shape)}")
        refuse_to_write(content, f"{part.name} {list(part.index) or ''}".rstrip())
        return content.view(part.stacked_shape)

    def set_up_planner(
        self, state_dict: dict[str, object], storage_meta: object = None, is_coordinator: bool = False
    ) -> None:
        raise NotImplementedError("made with its slices")

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError("made with its slices")

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError("made with its slices")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError("made with its slices")

"""The load strategy of checkpoints: each stored chunk is read once for all ranks that hold the same weights.

With Megatron-Core's strategies each rank reads all chunks that it needs a part of. Ranks of a data-parallel group need
the same weights, and of an optimizer's states parts that cut chunks anywhere, while torch's reader reads chunks whole.
Here they name the chunks that they need, share the reading (:mod:`.shared_reading`), and each copies its parts out of
the pieces that pass by.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import Tensor

from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.checkpoint_pickles import load_without_code
from mft_megatron.mcore.platform.releases import accepted

from .blocks import overlap
from .failures import agreed
from .shared_reading import Piece, SharedReader
from .tensor_reader import TensorReader
from .weight_source import WeightSlice

load_without_code()

# name of a tensor, and offset and shape of one of its chunks
_Chunk: TypeAlias = "tuple[str, tuple[int, ...], tuple[int, ...]]"
# an index of a tensor
_Block: TypeAlias = "tuple[slice, ...]"
# offset of a part that a rank needs, and the tensor that it is loaded into
_Part: TypeAlias = "tuple[tuple[int, ...], Tensor]"


class SharedLoad(TorchDistLoadShardedStrategy):
    """Loads tensors through :class:`.shared_reading.SharedReader`, and objects as Megatron-Core does."""

    def __init__(self, path: Path, reader: TensorReader):
        """Prepare to load.

        Args:
            path: the checkpoint's folder, for messages.
            reader: of that checkpoint.
        """
        # tensors of 8 bits are dequantised before the load, as releases without this option do
        super().__init__(**accepted(TorchDistLoadShardedStrategy.__init__, stream_ckpt_dequant=False))
        self._path, self._reader = path, reader

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *of_release: Any) -> dict[str, Any]:
        """Load all entries of a state dict; a collective of all ranks.

        Args:
            sharded_state_dict: sharded tensors, which are loaded into their content, and sharded objects.
            checkpoint_dir: the folder, in the type that this release gives.
            of_release: further arguments of newer releases.

        Returns:
            the state dict with contents instead of sharded entries.

        Raises:
            InputError: the checkpoint lacks a tensor, has another shape of it, or is damaged; the same on all ranks.
        """
        objects, tensors = extract_matching_values(sharded_state_dict, lambda entry: isinstance(entry, ShardedObject))
        read_objects = functools.partial(super().load, objects, checkpoint_dir, *of_release)
        loaded = agreed(self._path, read_objects)
        shards = list(nested_values(tensors))
        process_groups.raise_on_all_ranks(self._mismatch(shards))
        refusals = [
            self._fill([shard for shard in shards if (".experts." in shard.key) == of_experts], group)
            for of_experts, group in (
                (False, parallel_state.get_data_parallel_group(with_context_parallel=True)),
                (True, parallel_state.get_expert_data_parallel_group()),
            )
        ]
        process_groups.raise_on_all_ranks(refusals[0] or refusals[1])
        dict_list_map_inplace(lambda shard: shard.data, tensors)
        merge(loaded, tensors)
        return loaded

    def _mismatch(self, shards: Iterable[ShardedTensor]) -> str | None:
        """Why the checkpoint is one of another model; ``None`` if it is not."""
        for shard in shards:
            try:
                stored, _ = self._reader.entry(shard.key)
            except KeyError:
                return f"{self._path}: has no {shard.key}; it is a checkpoint of another model or optimizer"
            wanted = tuple(shard.global_shape)
            if stored != wanted and not (shard.allow_shape_mismatch and len(stored) == len(wanted)):
                return (
                    f"{self._path}: {shard.key} has the shape {list(stored)}, {list(wanted)} is needed; it is a "
                    "checkpoint of another model"
                )
        return None

    @torch.no_grad()
    def _fill(self, shards: Sequence[ShardedTensor], group: dist.ProcessGroup) -> str | None:
        """Load into the content of shards; returns why this rank could not read a chunk, or ``None``."""
        wanted: dict[str, list[_Part]] = {}
        for shard in shards:
            wanted.setdefault(shard.key, []).append((tuple(shard.global_offset), _content(shard)))
        chunks = {name: list(self._reader.chunks(name)) for name in wanted}
        parts = {name: Parts(wanted[name], [shape for _, shape in chunks[name]]) for name in wanted}
        needed = {(name, *chunk) for name in wanted for chunk in chunks[name] if next(parts[name].within(*chunk), None)}
        of_ranks: list[set[_Chunk]] = [needed] * group.size()
        if group.size() > 1:
            dist.all_gather_object(of_ranks, needed, group=group)
        slices = [_slice_of(chunk) for chunk in sorted(set().union(*of_ranks))]

        def take(piece: Piece) -> None:
            stored = slices[piece.weight]
            start = (*stored.index, stored.start[0] + piece.first, *stored.start[1:])
            rows = piece.content.view((*(1 for _ in stored.index), *piece.content.shape))
            if stored.name in parts:
                for of_rows, of_content, content in parts[stored.name].within(start, rows.shape):
                    content[of_content] = rows[of_rows]

        reader = SharedReader(_Chunks(self._reader), group)
        reader.read([[one] for one in slices], take)
        return reader.refusal


class Parts:
    """The parts of one tensor that a rank needs, by the layer and expert that they are of.

    A stack of 94 layers of 128 experts has 12,032 chunks: to compare each with every part would take minutes.
    """

    def __init__(self, parts: Sequence[_Part], chunk_shapes: Iterable[Sequence[int]]):
        """Sort the parts.

        Args:
            parts: offset and content of each.
            chunk_shapes: shapes of the tensor's stored chunks.
        """
        shapes = [*(content.shape for _, content in parts), *chunk_shapes]
        # leading axes of which every part and every chunk has one element
        self._stacked = min(
            next((axis for axis, size in enumerate(shape) if size != 1), len(shape)) for shape in shapes
        )
        self._by_index: dict[tuple[int, ...], list[_Part]] = {}
        for offset, content in parts:
            self._by_index.setdefault(offset[: self._stacked], []).append((offset, content))

    def within(self, offset: tuple[int, ...], shape: Sequence[int]) -> Iterator[tuple[_Block, _Block, Tensor]]:
        """The parts that a chunk, or a piece of one, overlaps.

        Yields:
            the elements of the chunk, those of the part, and the part's content.
        """
        for start, content in self._by_index.get(offset[: self._stacked], ()):
            common = overlap(offset, shape, start, content.shape)
            if common is not None:
                yield *common, content


class _Chunks:
    """Stored chunks as a source of weights."""

    def __init__(self, reader: TensorReader):
        self._reader = reader

    def read(self, wanted: WeightSlice) -> Tensor:
        return self._reader.read_region(wanted.name, wanted.offset, wanted.stacked_shape).view(wanted.shape)


def _content(shard: ShardedTensor) -> Tensor:
    """The tensor that a shard is loaded into, with the axes of the stack; 0 where the checkpoint may have nothing."""
    shard.init_data(devices.device())
    content = shard.data.detach()
    if shard.allow_shape_mismatch:
        content.zero_()
    return content.view((*(1 for _ in range(shard.prepend_axis_num)), *content.shape))


def _slice_of(chunk: _Chunk) -> WeightSlice:
    """A chunk without its leading axes of one element, so that it can be sent in pieces of the next axis."""
    name, offset, shape = chunk
    stacked = next((axis for axis, size in enumerate(shape[:-1]) if size != 1), len(shape) - 1)
    return WeightSlice(name, offset[:stacked], offset[stacked:], shape[stacked:])

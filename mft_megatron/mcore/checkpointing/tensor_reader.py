"""Single weights of a distributed checkpoint, whole, without process groups and without a model.

Megatron-Core's ``torch_dist`` checkpoints are checkpoints of ``torch.distributed.checkpoint``. Its reader is given the
pieces that a weight, or one layer of a stack of weights, is stored in, so memory is that of the weights asked for.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mft_megatron.errors import InputError

Request = tuple[str, int | tuple[int, ...] | None]


class TensorReader:
    """Reads weights of the checkpoint in one ``iter_NNNNNNN`` folder."""

    def __init__(self, path: Path):
        """
        Raises:
            InputError: the checkpoint's index is missing or damaged.
        """
        self._path = path
        self._reader = FileSystemReader(path)
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:
            raise InputError(
                f"{path}: its index .metadata cannot be read ({error}); the checkpoint is damaged"
            ) from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def names(self) -> list[str]:
        """Names of the model's weights; layers of a kind are stacked under one name."""
        return [
            name
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        ]

    def has_entry(self, name: str) -> bool:
        """Whether something is stored under exactly this name, weight or not."""
        return name in self._metadata.state_dict_metadata

    def entry(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape, with the axes of the stack, and dtype of a weight."""
        stored = self._metadata.state_dict_metadata[name]
        return tuple(stored.size), stored.properties.dtype

    def read(self, requests: Iterable[Request]) -> list[Tensor]:
        """Weights by ``(name, place)``, on the CPU.

        A place is a layer, ``(layer, expert)``, or ``None`` or ``()`` for a weight that is not part of a stack.

        Raises:
            InputError: a file of the checkpoint is missing or damaged.
        """
        planner = _WeightPlanner(
            [(name, _place(place), self._metadata.state_dict_metadata[name]) for name, place in requests]
        )
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        try:
            self._reader.read_data(plan, planner).wait()
        except Exception as error:
            raise InputError(f"{self._path}: cannot be read ({error}); the checkpoint is damaged") from None
        return planner.weights()


class _WeightPlanner(LoadPlanner):
    """Tells torch's reader where each stored piece goes."""

    def __init__(self, requests: list[tuple[str, tuple[int, ...], TensorStorageMetadata]]):
        self._requests = requests
        self._chunks: list[ChunkStorageMetadata] = []
        self._data: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        for name, place, stored in requests:
            rest = stored.size[len(place) :]
            chunk = ChunkStorageMetadata(
                torch.Size([*place, *(0 for _ in rest)]), torch.Size([*(1 for _ in place), *rest])
            )
            self._chunks.append(chunk)
            self._data[name, tuple(chunk.offsets)] = torch.empty(chunk.sizes, dtype=stored.properties.dtype)

    def weights(self) -> list[Tensor]:
        return [
            self._data[name, tuple(chunk.offsets)].view(chunk.sizes[len(place) :])
            for (name, place, _), chunk in zip(self._requests, self._chunks, strict=True)
        ]

    def create_local_plan(self) -> LoadPlan:
        items = []
        for (name, _, stored), chunk in zip(self._requests, self._chunks, strict=True):
            items += create_read_items_for_chunk_list(name, stored, [chunk])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a weight that one stored piece fills."""
        weight = self._data[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            weight = weight.narrow(axis, start, length)
        return weight

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The piece is in place already: the reader copies into what :meth:`resolve_tensor` gave."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        raise NotImplementedError("made with its requests")

    def create_global_plan(self, global_plan):
        return global_plan

    def finish_plan(self, new_plan):
        return new_plan

    def load_bytes(self, read_item: ReadItem, value) -> None:
        raise NotImplementedError("only weights are read")


def _place(place: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if place is None:
        return ()
    return (place,) if isinstance(place, int) else place

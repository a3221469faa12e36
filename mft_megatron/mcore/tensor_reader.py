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

Request = tuple[str, int | None]


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

    def read(self, requests: Iterable[Request]) -> list[Tensor]:
        """Weights by ``(name, layer)``, on the CPU; layer ``None`` for a weight that is not part of a stack.

        Raises:
            InputError: a file of the checkpoint is missing or damaged.
        """
        planner = _WeightPlanner([(name, layer, self._metadata.state_dict_metadata[name]) for name, layer in requests])
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        try:
            self._reader.read_data(plan, planner).wait()
        except Exception as error:
            raise InputError(f"{self._path}: cannot be read ({error}); the checkpoint is damaged") from None
        return planner.weights()


class _WeightPlanner(LoadPlanner):
    """Tells torch's reader where each stored piece goes."""

    def __init__(self, requests: list[tuple[str, int | None, TensorStorageMetadata]]):
        self._requests = requests
        self._chunks: dict[Request, ChunkStorageMetadata] = {}
        self._data: dict[Request, Tensor] = {}
        for name, layer, stored in requests:
            offsets = torch.Size([layer or 0, *[0] * (len(stored.size) - 1)])
            sizes = stored.size if layer is None else torch.Size([1, *stored.size[1:]])
            self._chunks[name, layer] = ChunkStorageMetadata(offsets, sizes)
            self._data[name, layer] = torch.empty(sizes, dtype=stored.properties.dtype)

    def weights(self) -> list[Tensor]:
        return [
            self._data[name, layer] if layer is None else self._data[name, layer].squeeze(0)
            for name, layer, _ in self._requests
        ]

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, layer, stored in self._requests:
            items += create_read_items_for_chunk_list(name, stored, [self._chunks[name, layer]])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a weight that one stored piece fills."""
        name, first = read_item.dest_index.fqn, read_item.dest_index.offset[0]
        weight = self._data.get((name, first), self._data.get((name, None)))
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

"""Read single weights of a distributed checkpoint, whole, without process groups and without a model.

Megatron-Core's ``torch_dist`` checkpoints are checkpoints of ``torch.distributed.checkpoint``. torch's reader is given
only the stored chunks of the requested weights or layers, so memory is that of the result. No code in a checkpoint is
executed: it may come from anywhere.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mft_megatron.common_state import INDEX
from mft_megatron.errors import InputError
from mft_megatron.mcore.platform.checkpoint_pickles import load_index
from mft_megatron.run_folder.files import damage, remedy
from mft_megatron.run_folder.names import INFO


class TensorReader:
    """Reads weights of the checkpoint in one ``iter_NNNNNNN`` folder."""

    def __init__(self, path: Path):
        """Read the checkpoint's index.

        Raises:
            InputError: it is missing or damaged.
        """
        self._path = path
        self._reader = FileSystemReader(path)
        try:
            with open(path / INDEX, "rb") as stream:
                self._metadata = load_index(stream)
        except Exception as error:  # a pickle can fail in any way
            how = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise InputError(f"{path}: its index {INDEX} {how}; the checkpoint is damaged; {_remedy(path)}") from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def names(self) -> list[str]:
        """Names of the model's weights; layers of a kind are stacked under one name."""
        return [name for name in self._tensors if not name.startswith("optimizer.")]

    def has_entry(self, name: str) -> bool:
        """Whether an entry is stored under exactly this name, tensor or not."""
        return name in self._metadata.state_dict_metadata

    def entry(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape, including the axes of the stack, and dtype of a tensor.

        Raises:
            KeyError: there is no such tensor.
        """
        stored = self._tensors[name]
        return tuple(stored.size), stored.properties.dtype

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """Read a weight.

        Args:
            name: in the checkpoint.
            index: position in the stack: ``(layer,)``, ``(layer, expert)``, or ``()`` for the whole weight, stacked or
                not.

        Returns:
            the weight without the indexed axes, on the CPU, in its stored dtype.

        Raises:
            KeyError: there is no such tensor.
            InputError: a file of the checkpoint is missing or damaged.
        """
        rest = self._tensors[name].size[len(index) :]
        offset, shape = (*index, *(0 for _ in rest)), (*(1 for _ in index), *rest)
        return self.read_region(name, offset, shape).view(rest)

    def chunks(self, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offset and shape, with the axes of the stack, of each chunk that a tensor is stored in.

        Raises:
            KeyError: there is no such tensor.
        """
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in self._tensors[name].chunks]

    def read_region(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Read a part of a tensor; of each stored chunk that it overlaps the whole is read.

        Args:
            name: in the checkpoint.
            offset: of the part's first element along each axis, those of the stack too.
            shape: of the part.

        Returns:
            the part, on the CPU, in the stored dtype.

        Raises:
            KeyError: there is no such tensor.
            InputError: a file of the checkpoint is missing or damaged.
        """
        planner = _RegionPlanner(name, self._tensors[name], offset, shape)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        try:
            self._reader.read_data(plan, planner).wait()
        except Exception as error:
            problem = damage(self._path) or f"cannot be read ({error})"
            raise InputError(f"{self._path}: {problem}; the checkpoint is damaged; {_remedy(self._path)}") from None
        return planner.data


def _remedy(path: Path) -> str:
    return remedy(path, INFO if (path / INFO).is_file() else None)


class _RegionPlanner(LoadPlanner):
    """Gives torch's reader the memory for the stored chunks of a part of a tensor.

    Attributes:
        data: the part, of the stored dtype; undefined until it is read.
    """

    def __init__(self, name: str, stored: TensorStorageMetadata, offset: Sequence[int], shape: Sequence[int]):
        self._name, self._stored = name, stored
        self._wanted = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        self.data = torch.empty(self._wanted.sizes, dtype=stored.properties.dtype)

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(create_read_items_for_chunk_list(self._name, self._stored, [self._wanted]))

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Give the slice of the part that one stored chunk fills."""
        part = self.data
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the reader has copied into the slice that :meth:`resolve_tensor` gave."""

    def set_up_planner(
        self, state_dict: dict[str, object], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        raise NotImplementedError("made with its weight")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: object) -> None:
        raise NotImplementedError("only weights are read")

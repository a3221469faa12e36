"""Adapters merged into the model beside them: a Hugging Face folder that needs no PEFT.

::

    weight of the base ─► + scale · B A of each adapter, in fp64 ─► rounded to the base's dtype ─► safetensors shards

Weights stream through memory one at a time. The folder is written beside its final place and renamed when it is whole.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.atomic_folder import refuse_content, replacing
from mft_megatron.convert.huggingface import model_export
from mft_megatron.convert.huggingface.family import Family, first_difference
from mft_megatron.convert.huggingface.mapped_weight import MappedWeight
from mft_megatron.convert.huggingface.model_folder import CONFIG, copy_kept_files, read_architecture, same_tokenizer
from mft_megatron.convert.huggingface.model_import import describe_folder, refuse_mismatch
from mft_megatron.convert.huggingface.row_layouts import sizes_of, split
from mft_megatron.convert.huggingface.safetensors_reader import WeightFiles
from mft_megatron.convert.huggingface.safetensors_writer import PlannedWeight, ShardWriter
from mft_megatron.errors import InputError
from mft_megatron.lora import is_adapter
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from mft_megatron.mcore.checkpointing.vocabulary import without_padding
from mft_megatron.run_folder import CheckpointInfo, CheckpointRef, is_checkpoint, latest_checkpoint

# of a weight in fp64 at a time
PIECE_BYTES = 64 * 2**20


class Adapter(Protocol):
    """A and B by the name of a Hugging Face weight, and what B A is multiplied by."""

    scale: float

    def factors(self, weight: str) -> tuple[Tensor, Tensor] | None: ...


class Base(Protocol):
    """The model that adapters are merged into. ``path``: where it is; ``info``: its description."""

    path: Path
    info: CheckpointInfo
    family: Family
    architecture: NetworkArguments

    def planned(self, row: MappedWeight, place: tuple[int, ...]) -> list[PlannedWeight]:
        """The Hugging Face weights that a row stands for."""

    def read(self, row: MappedWeight, place: tuple[int, ...]) -> Iterator[Tensor]:
        """Their content, in the same order."""

    def write_config(self, folder: Path) -> None:
        """What is in a folder besides weights."""

    def close(self) -> None: ...


class FolderBase:
    """A Hugging Face folder."""

    def __init__(self, folder: Path):
        """
        Raises:
            InputError: the model is not supported, or its folder is not whole.
        """
        self.path = folder
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"--base {folder}: no safetensors files there; give the folder of a whole model")
        self.family, self.architecture, vocab_size = read_architecture(folder)
        self._files = WeightFiles(folder)
        with contextlib.closing(self._files):
            refuse_mismatch(self._files, self.family, self.architecture, vocab_size)
        self.info = describe_folder(self._files, self.family, self.architecture, vocab_size)

    def planned(self, row: MappedWeight, place: tuple[int, ...]) -> list[PlannedWeight]:
        names = [name.format(*place) for name in row.hf_names]
        stored = [self._files.weights[name] for name in names]
        return [PlannedWeight(name, s.dtype, s.shape) for name, s in zip(names, stored, strict=True)]

    def read(self, row: MappedWeight, place: tuple[int, ...]) -> Iterator[Tensor]:
        for weight in self.planned(row, place):
            content = torch.empty(weight.shape, dtype=weight.dtype)
            self._files.read_into(content, weight.name, 0)
            yield content

    def write_config(self, folder: Path) -> None:
        copy_kept_files(self.path, folder)

    def close(self) -> None:
        self._files.close()


class CheckpointBase:
    """The model in one ``iter_NNNNNNN`` folder; adapters that are stored with it are passed over."""

    def __init__(self, path: Path, info: CheckpointInfo):
        """
        Raises:
            InputError: the checkpoint has no model, is damaged, or no family can express it.
        """
        if not info.has_base:
            raise InputError(f"{path}: holds adapters alone; give --base, the model that they were trained on")
        self.info, self.path = info, path
        self.architecture = NetworkArguments(**info.architecture)
        self.family = model_export.family_of_checkpoint(path, info)
        self._reader = _ModelReader(path)
        self._sizes = sizes_of(self.architecture, info.vocab_size)
        model_export.refuse_mismatch(self._reader, self.family, self.architecture, self._sizes, path)

    def planned(self, row: MappedWeight, place: tuple[int, ...]) -> list[PlannedWeight]:
        dtype, shapes = self._reader.entry(row.name)[1], row.hf_shapes(self._sizes)
        return [
            PlannedWeight(name.format(*place), dtype, shape) for name, shape in zip(row.hf_names, shapes, strict=True)
        ]

    def read(self, row: MappedWeight, place: tuple[int, ...]) -> Iterator[Tensor]:
        weight = without_padding(row.name, self._reader.read(row.name, place), self.info.vocab_size)
        yield from split(weight, row.blocks(self._sizes))

    def write_config(self, folder: Path) -> None:
        dtype = self._reader.entry(self.family.weights(self.architecture)[-1].name)[1]
        model_export.write_config(self.path, self.info, self.family, dtype, folder)

    def close(self) -> None:
        """Nothing stays open."""


class _ModelReader(TensorReader):
    """The weights of a checkpoint but for those of adapters."""

    def names(self) -> list[str]:
        return [name for name in super().names() if not is_adapter(name)]


def open_base(path: Path, option: str = "--base") -> Base:
    """The model in a Hugging Face folder, a run folder (its newest checkpoint) or an ``iter_NNNNNNN`` folder.

    Raises:
        InputError: it is neither, not whole, or has adapters of its own.
    """
    if (path / CONFIG).is_file():
        return FolderBase(path)
    if not is_checkpoint(path):
        what = "is neither a Hugging Face folder nor a checkpoint" if path.is_dir() else "is no folder"
        raise InputError(f"{option} {path}: {what}; give the model that the adapters were trained on")
    found = latest_checkpoint(path, option)
    if found.info.lora is not None:
        raise InputError(f"{option} {found.path}: has adapters of its own; merge them first, with merge-lora --load")
    return CheckpointBase(found.path, found.info)


def refuse_other_model(base: Base, info: CheckpointInfo, what: str) -> None:
    """Check that a model is of the architecture that adapters were trained on.

    Raises:
        InputError: it is of another one.
    """
    difference = first_difference(NetworkArguments(**info.architecture), base.architecture)
    if difference is None and base.info.vocab_size != info.vocab_size:
        difference = "vocab_size", info.vocab_size, base.info.vocab_size
    if difference is not None:
        name, trained, has = difference
        raise InputError(f"{what}: {name} is {has}, the adapters were trained with {trained}")


def merge(
    base: Base,
    adapters: Sequence[Adapter],
    target: Path,
    shard_bytes: int,
    trained: CheckpointRef | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write the model with its adapters merged into the new folder ``target``, in this process alone.

    Args:
        base: the model; weights keep its dtype.
        adapters: their products are added one to another, and to the weight, in fp64.
        target: folder to make; must not exist, or be empty.
        shard_bytes: size at which a new shard is begun.
        trained: the checkpoint that the adapters are from; the tokenizer of its run is written. ``None``: they are
            from no checkpoint.
        tokenizer: folder of tokenizer files to copy instead.

    Raises:
        InputError: ``target`` has content, or a file is damaged.
    """
    refuse_content(target, "--hf")
    rows = base.family.weights(base.architecture)
    in_order = model_export.in_order(rows, base.architecture)
    planned = [weight for row, place in in_order for weight in base.planned(row, place)]
    with contextlib.closing(base), replacing(target) as partial:
        with contextlib.closing(ShardWriter(partial, planned, shard_bytes)) as writer:
            for row, place in in_order:
                for weight, content in zip(base.planned(row, place), base.read(row, place), strict=True):
                    writer.write(weight.name, merged(content, weight.name, adapters))
            writer.finish()
        base.write_config(partial)
        run = trained.path.parent if trained is not None else None
        model_export.write_generation_config(trained.info if trained is not None else base.info, partial)
        # what is asked for, that of the run, or that of the base, which is there already
        if run is not None or (tokenizer is not None and not same_tokenizer(tokenizer, partial)):
            model_export.write_tokenizer(run or partial, tokenizer, partial)


def merged(weight: Tensor, name: str, adapters: Sequence[Adapter]) -> Tensor:
    """A Hugging Face weight [out, in] with the adapters on it, in its own memory and dtype: W + Σ scale · B A."""
    found = [(adapter.scale, factors) for adapter in adapters if (factors := adapter.factors(name)) is not None]
    if not found:
        return weight
    step = max(1, PIECE_BYTES // (8 * weight.shape[1]))
    for first in range(0, len(weight), step):
        rows = weight[first : first + step]
        total = rows.double()
        for scale, (a, b) in found:
            total.addmm_(b[first : first + step].double(), a.double(), alpha=scale)
        rows.copy_(total)
    return weight

"""A whole model on disk as the weights of a Hugging Face folder, whether it is one or a checkpoint.

::

    Hugging Face folder ─► FolderModel ──────┐
    checkpoint ─► rows split ─► CheckpointModel ┴─► (name, weight), one at a time, in the order of the model
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mft_megatron.arguments.groups.network import NetworkArguments, stored_network
from mft_megatron.convert.huggingface.families.table import family_for
from mft_megatron.errors import InputError
from mft_megatron.lora import is_adapter
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from mft_megatron.mcore.checkpointing.vocabulary import has_shape, without_padding
from mft_megatron.mcore.platform.precisions import BY_DTYPE
from mft_megatron.run_folder.description import CheckpointInfo, CheckpointRef
from mft_megatron.run_folder.names import HUGGINGFACE

from .family import Family, first_difference
from .mapped_weight import MappedWeight
from .model_folder import CONFIG, copy_kept_files, read_architecture
from .row_layouts import sizes_of, split
from .safetensors_writer import PlannedWeight
from .weight_source import HuggingFaceSource


class StoredModel(Protocol):
    """A model that can be written as a Hugging Face folder.

    Attributes:
        path: its folder.
        info: its description.
        family: its model family.
        architecture: its sizes.
        notes: lines for the user about what was read otherwise than it is stored, or not.
    """

    path: Path
    info: CheckpointInfo
    family: Family
    architecture: NetworkArguments
    notes: Sequence[str]

    def planned(self) -> list[PlannedWeight]:
        """Name, dtype and shape of every Hugging Face weight, in the order of the model."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Read the weights of :meth:`planned` in the same order, one at a time.

        Yields:
            name, and content: contiguous, on the CPU, of the planned dtype and shape.

        Raises:
            InputError: a file is damaged.
        """

    def write_config(self, folder: Path) -> None:
        """Write the files of a Hugging Face folder besides weights."""


class FolderModel:
    """The model in a Hugging Face folder, as a :class:`StoredModel`."""

    def __init__(self, folder: Path):
        """Open a folder and check its weights.

        Raises:
            InputError: the model is not supported, or its folder is incomplete.
        """
        self._source = source = HuggingFaceSource(folder)
        self.path, self.info = source.folder, source.info
        self.family, self.architecture = source.family, source.architecture
        self.notes: Sequence[str] = source.notes

    def planned(self) -> list[PlannedWeight]:
        """Name, dtype and shape of every weight, in the order of the model."""
        ordered = in_order(self._source.mapped, self.architecture)
        names = [name for weight, index in ordered for name in weight.hf_names_at(index)]
        stored = [self._source.files.weights[name] for name in names]
        return [PlannedWeight(name, entry.dtype, entry.shape) for name, entry in zip(names, stored, strict=True)]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Read the weights in the same order, one at a time."""
        with contextlib.closing(self._source):
            for weight in self.planned():
                content = torch.empty(weight.shape, dtype=weight.dtype)
                self._source.files.read_into(content, weight.name, 0)
                yield weight.name, content

    def write_config(self, folder: Path) -> None:
        """Copy the files besides weights."""
        self._source.keep(folder)


class CheckpointModel:
    """The model in a checkpoint, without the adapters stored beside it, as a :class:`StoredModel`."""

    notes: Sequence[str] = ()

    def __init__(self, checkpoint: CheckpointRef):
        """Open a checkpoint and check its weights.

        Raises:
            InputError: the checkpoint is damaged, or no family can express its model.
        """
        self.path, self.info = checkpoint.path, checkpoint.info
        self.architecture = stored_network(self.info.architecture, str(self.path))
        self.family = _family_of(checkpoint)
        self._mapped = self.family.weights(self.architecture)
        self._reader = TensorReader(self.path)
        self._sizes = sizes_of(self.architecture, self.info.vocab_size)
        self._refuse_mismatch()

    def planned(self) -> list[PlannedWeight]:
        """Name, dtype and shape of every Hugging Face weight, in the order of the model."""
        return [
            PlannedWeight(name, self._reader.entry(weight.name)[1], shape)
            for weight, index in in_order(self._mapped, self.architecture)
            for name, shape in zip(weight.hf_names_at(index), weight.hf_shapes(self._sizes), strict=True)
        ]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Read the weights in the same order; one weight of the checkpoint is in memory at a time."""
        for weight, index in in_order(self._mapped, self.architecture):
            content = without_padding(weight.name, self._reader.read(weight.name, index), self._sizes["vocab"])
            yield from zip(weight.hf_names_at(index), split(content, weight.blocks(self._sizes)), strict=True)

    def write_config(self, folder: Path) -> None:
        """Write the files that the model came with besides weights, or else a configuration from its description."""
        if self.info.from_hugging_face:
            copy_kept_files(self.path.parent / HUGGINGFACE, folder)
            return
        config = {
            **self.family.write_config(self.architecture),
            "vocab_size": self.info.vocab_size,
            "torch_dtype": BY_DTYPE[self._reader.entry(self._mapped[-1].name)[1]].huggingface,
            "use_cache": True,
            **special_tokens(self.info),
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def _refuse_mismatch(self) -> None:
        """Check that the checkpoint holds exactly the weights of its architecture.

        Raises:
            InputError: a weight is missing, left over, or of another shape.
        """
        expected = {weight.name for weight in self._mapped}
        stored = {name for name in self._reader.names() if self.info.lora is None or not is_adapter(name)}
        for names, problem in (
            (expected - stored, "has no"),
            (stored - expected, f"has weights {self.family.name} has not:"),
        ):
            if names:
                raise InputError(
                    f"{self.path}: {problem} {', '.join(sorted(names))}; it was not written by this program"
                )
        for weight in self._mapped:
            shape = self._reader.entry(weight.name)[0]
            wanted = (*weight.stack(self.architecture), *weight.shape(self._sizes))
            if not has_shape(weight.name, shape, wanted):
                raise InputError(
                    f"{self.path}: {weight.name} has the shape {list(shape)}, its description says {list(wanted)}; the "
                    "checkpoint is damaged"
                )


def _family_of(checkpoint: CheckpointRef) -> Family:
    """Choose the family to write the model of a checkpoint as: its original one, or the first that can express it.

    Raises:
        InputError: no family can, or the original configuration is gone or is that of another model.
    """
    path, info = checkpoint.path, checkpoint.info
    architecture, source = stored_network(info.architecture, str(path)), path.parent / HUGGINGFACE
    if not info.from_hugging_face:
        return family_for(architecture)
    if not (source / CONFIG).is_file():
        raise InputError(
            f"{path}: came from Hugging Face, but {source / CONFIG} is gone; put the original's config.json there"
        )
    family, expected, _ = read_architecture(source)
    if difference := first_difference(architecture, expected):
        name, has, says = difference
        raise InputError(
            f"{source / CONFIG}: {name} is {says}, the checkpoint has {has}; it is the configuration of another model"
        )
    return family


def in_order(
    mapped: Sequence[MappedWeight], architecture: NetworkArguments
) -> list[tuple[MappedWeight, tuple[int, ...]]]:
    """Every weight with its index in the stack: those before the layers, layer by layer, those after the layers."""
    in_layers = [position for position, weight in enumerate(mapped) if weight.in_layers]

    def order(entry: tuple[int, tuple[int, ...]]) -> tuple[int, ...]:
        position, index = entry
        stage = 0 if position < in_layers[0] else 2 if position > in_layers[-1] else 1
        return (stage, *index[:1], position, *index[1:])

    entries = [(position, index) for position, weight in enumerate(mapped) for index in weight.indices(architecture)]
    return [(mapped[position], index) for position, index in sorted(entries, key=order)]


def special_tokens(info: CheckpointInfo) -> dict[str, int]:
    """Ids of the special tokens that the tokenizer of a checkpoint has, as ``config.json`` names them."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: info.tokenizer[name] for name in names if info.tokenizer.get(name) is not None}

"""``adapter_model.safetensors``: which matrices of a model an adapter is on, and any part of its A and B.

::

    base_model.model. model.layers.0.self_attn.q_proj .lora_A.weight    [rank, in]
                      the module's name in the model  .lora_B.weight    [out, rank]
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.family import Family
from mft_megatron.convert.huggingface.mapped_weight import MappedWeight, names_of
from mft_megatron.convert.huggingface.row_layouts import sizes_of
from mft_megatron.convert.huggingface.safetensors_reader import StoredWeight, read_header
from mft_megatron.errors import InputError
from mft_megatron.lora import SOURCES

from .adapter_rows import linear_rows
from .config import WEIGHTS, PeftConfig

_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_[AB]\.weight")
# what else stands in such files, and what it means
_OTHERS = {
    "lora_embedding_": "adapters of embeddings cannot be expressed",
    "lora_magnitude_vector": "DoRA cannot be expressed",
    ".bias": "trained biases cannot be expressed",
    ".weight": "whole matrices beside the adapters cannot be expressed",
}
# by a module's full name: the row of its weight, its number in it, its layer
Modules = Mapping[str, tuple[MappedWeight, int, int]]


def key_of(module: str, letter: str) -> str:
    """The name of a module's A or B in the file."""
    return f"{_PREFIX}{module}.lora_{letter}.weight"


class PeftWeights:
    """The weights in a folder. ``modules``: those that have an adapter; ``numbers``: the same by module of ours, as
    numbers in the row of its weight."""

    def __init__(self, folder: Path, config: PeftConfig, family: Family, architecture: NetworkArguments):
        """
        Raises:
            InputError: a weight is missing, not of such a model, of another shape, or not there for every layer.
        """
        self.file = folder / WEIGHTS
        self.stored = _header(folder)
        everywhere = _modules(family, architecture)
        self.modules: Modules = {name: everywhere[name] for name in self._names(everywhere, family, architecture)}
        self._refuse_other_shapes(config, family, architecture)
        self.numbers = self._in_every_layer(everywhere)
        # only what is asked for is read of the map
        self._content = safe_open(self.file, framework="pt")

    @property
    def dtype(self) -> torch.dtype:
        """That of all weights, or the largest."""
        return max((weight.dtype for weight in self.stored.values()), key=lambda dtype: dtype.itemsize)

    def has(self, module: str) -> bool:
        """Whether a module of that name has an adapter."""
        return key_of(module, "A") in self.stored

    def whole(self, module: str, letter: str) -> Tensor:
        """A or B of a module."""
        return self._content.get_tensor(key_of(module, letter))

    def part(self, module: str, letter: str, rows: slice, columns: slice) -> Tensor:
        """Some rows and columns of it."""
        return self._content.get_slice(key_of(module, letter))[rows, columns]

    def _names(self, everywhere: Modules, family: Family, architecture: NetworkArguments) -> list[str]:
        """The modules that the weights are of."""
        names = {}
        for key in sorted(self.stored):
            match = _KEY.fullmatch(key)
            if match is None:
                reason = next((text for piece, text in _OTHERS.items() if piece in key), "not understood")
                raise InputError(f"{self.file}: {key}: {reason}")
            name = match["module"]
            if name not in everywhere:
                known = f"{name}.weight" in names_of(family.weights(architecture), architecture) or ".experts." in name
                what = (
                    "embeddings, output layer, routers and experts cannot have one here; train one without it"
                    if known
                    else f"a {family.name} of this size has no such matrix: it is the adapter of another model"
                )
                raise InputError(f"{self.file}: has an adapter on {name}; {what}")
            names[name] = True
        if not names:
            raise InputError(f"{self.file}: holds no weights; write the adapter again")
        return list(names)

    def _refuse_other_shapes(self, config: PeftConfig, family: Family, architecture: NetworkArguments) -> None:
        sizes = sizes_of(architecture, 0)
        for module, (row, number, _) in self.modules.items():
            rows, columns = row.hf_shapes(sizes)[number]
            rank = config.rank_of(module)
            for letter, wanted in (("A", (rank, columns)), ("B", (rows, rank))):
                key = key_of(module, letter)
                if key not in self.stored:
                    raise InputError(f"{self.file}: {key} is missing; write the adapter again")
                if (shape := self.stored[key].shape) != wanted:
                    raise InputError(
                        f"{self.file}: {key} has the shape {list(shape)}, a {family.name} of this size and rank {rank} "
                        f"needs {list(wanted)}; it is the adapter of another model"
                    )

    def _in_every_layer(self, everywhere: Modules) -> dict[str, tuple[int, ...]]:
        numbers: dict[str, set[int]] = {}
        for row, number, _ in self.modules.values():
            numbers.setdefault(_ours(row), set()).add(number)
        for name, (row, number, _) in everywhere.items():
            if number in numbers.get(_ours(row), ()) and name not in self.modules:
                raise InputError(
                    f"{self.file}: has no adapter on {name}, but on its like in other layers; an adapter must be on "
                    "every layer"
                )
        return {module: tuple(sorted(numbers[module])) for module in SOURCES if module in numbers}


def _ours(row: MappedWeight) -> str:
    return row.name.split(".")[-2]


def _modules(family: Family, architecture: NetworkArguments) -> Modules:
    """Every module that can have an adapter."""
    return {
        name.removesuffix(".weight").format(layer): (row, number, layer)
        for row in linear_rows(family, architecture).values()
        for number, name in enumerate(row.hf_names)
        for layer in range(architecture.num_layers)
    }


def _header(folder: Path) -> dict[str, StoredWeight]:
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if any(folder.glob("adapter_model*.bin")):
        raise InputError(
            f"{folder}: its weights are no safetensors file; load the adapter with PEFT and write it again with "
            "save_pretrained"
        )
    raise InputError(f"{folder}: has no {WEIGHTS}; give the folder of a whole PEFT adapter")

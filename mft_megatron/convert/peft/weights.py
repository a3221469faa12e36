"""``adapter_model.safetensors``: the matrices of a model that have an adapter, and any slice of their A and B.

::

    base_model.model. model.layers.0.self_attn.q_proj .lora_A.weight    [rank, in]
                      name of the module in the model .lora_B.weight    [out, rank]
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.family import Family
from mft_megatron.convert.huggingface.mapped_weight import MappedWeight, names_of
from mft_megatron.convert.huggingface.row_layouts import sizes_of
from mft_megatron.convert.huggingface.safetensors_reader import StoredWeight, read_header
from mft_megatron.convert.huggingface.weight_names import wrappers_in
from mft_megatron.errors import InputError
from mft_megatron.lora import SOURCES
from mft_megatron.mcore.checkpointing.finite import refuse_non_finite

from .adapted_weights import linear_weights, module_name
from .config import WEIGHTS, PeftConfig

Letter: TypeAlias = Literal["A", "B"]
LETTERS: tuple[Letter, Letter] = ("A", "B")
_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_[AB]\.weight")
_DAMAGED = "the adapter is damaged: take an earlier checkpoint of its training"
# parts of other keys in such files, and why they are refused
_REFUSED = {
    "lora_embedding_": "adapters of embeddings cannot be expressed",
    "lora_magnitude_vector": "DoRA cannot be expressed",
    ".bias": "trained biases cannot be expressed",
    ".weight": "whole matrices beside the adapters cannot be expressed",
}


@dataclasses.dataclass(frozen=True)
class HuggingFaceModule:
    """A linear layer of a Hugging Face model.

    Attributes:
        megatron: Megatron's name of the module that it is fused in.
        mapped: weight of that module.
        position: index of the layer's weight in ``mapped.hf_names``.
        layer: index of the transformer layer.
    """

    megatron: str
    mapped: MappedWeight
    position: int
    layer: int


def key_of(module: str, letter: Letter) -> str:
    """Key in the file of a module's A or B."""
    return f"{_PREFIX}{module}.lora_{letter}.weight"


class PeftWeights:
    """The weights in the folder of an adapter; only the requested slices are read.

    Attributes:
        folder: the folder.
        family: family of the model that the adapter belongs to.
        architecture: architecture of that model.
        linear: weights of that model that can have an adapter, by Megatron's name of the module.
        modules: modules that have an adapter, by name.
        positions: positions of their weights in ``hf_names`` by Megatron's name of the module, the same in every layer.
    """

    def __init__(self, folder: Path, config: PeftConfig, family: Family, architecture: NetworkArguments):
        """Open a folder and check its weights.

        Args:
            folder: folder of the adapter.
            config: its configuration.
            family: family of the model.
            architecture: architecture of the model.

        Raises:
            InputError: a weight is missing, not of such a model, of another shape, or not there for every layer.
        """
        self.folder, self.family, self.architecture = folder, family, architecture
        self.linear = linear_weights(family, architecture)
        self._file = folder / WEIGHTS
        self._stored = _header(folder)
        every_module = self._every_module()
        self.modules = {name: every_module[name] for name in self._names(every_module)}
        self._refuse_other_shapes(config)
        self.positions = self._positions(every_module)
        # a memory map: only requested slices are read
        self._content = safe_open(self._file, framework="pt")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all weights, or the largest."""
        return max((weight.dtype for weight in self._stored.values()), key=lambda dtype: dtype.itemsize)

    def module(self, megatron: str, position: int, layer: int) -> str:
        """Name of a Hugging Face module, by the attributes of :class:`HuggingFaceModule`."""
        return module_name(self.linear[megatron], position).format(layer)

    def whole(self, module: str, letter: Letter) -> Tensor:
        """Read A [rank, in] or B [out, rank] of a module."""
        key = key_of(module, letter)
        content: Tensor = self._content.get_tensor(key)
        refuse_non_finite(content, f"{self._file}: {key}", _DAMAGED)
        return content

    def part(self, module: str, letter: Letter, rows: slice, columns: slice) -> Tensor:
        """Read some rows and columns of A or B of a module."""
        key = key_of(module, letter)
        content: Tensor = self._content.get_slice(key)[rows, columns]
        refuse_non_finite(content, f"{self._file}: {key}", _DAMAGED)
        return content

    def _every_module(self) -> Mapping[str, HuggingFaceModule]:
        """Every module of the model that can have an adapter, by name."""
        return {
            self.module(megatron, position, layer): HuggingFaceModule(megatron, mapped, position, layer)
            for megatron, mapped in self.linear.items()
            for position in range(len(mapped.hf_names))
            for layer in range(self.architecture.num_layers)
        }

    def _names(self, every_module: Mapping[str, HuggingFaceModule]) -> list[str]:
        """Names of the modules that the stored weights belong to.

        Raises:
            InputError: a weight is none of a LoRA adapter, or its module cannot have an adapter, or there are none.
        """
        names = {}
        for key in sorted(self._stored):
            if cause := _wrapped(key):
                raise InputError(f"{self._file}: {key}: {cause}; write the adapter with PEFT's save_pretrained")
            match = _KEY.fullmatch(key)
            if match is None:
                reason = next((text for part, text in _REFUSED.items() if part in key), "not understood")
                raise InputError(f"{self._file}: {key}: {reason}")
            name = match["module"]
            if name not in every_module:
                raise InputError(f"{self._file}: has an adapter on {name}; {self._no_adapter_on(name)}")
            names[name] = True
        if not names:
            raise InputError(f"{self._file}: holds no weights; write the adapter again")
        return list(names)

    def _no_adapter_on(self, module: str) -> str:
        """Why a module cannot have an adapter."""
        all_names = names_of(self.family.weights(self.architecture), self.architecture)
        if f"{module}.weight" in all_names or ".experts." in module:
            return "embeddings, output layer, routers and experts cannot have one here; train one without it"
        return f"a {self.family.name} of this size has no such matrix: it is the adapter of another model"

    def _refuse_other_shapes(self, config: PeftConfig) -> None:
        sizes = sizes_of(self.architecture, 0)
        for name, module in self.modules.items():
            rows, columns = module.mapped.hf_shapes(sizes)[module.position]
            rank = config.rank_of(name)
            for letter, wanted in zip(LETTERS, ((rank, columns), (rows, rank)), strict=True):
                key = key_of(name, letter)
                if key not in self._stored:
                    raise InputError(f"{self._file}: {key} is missing; write the adapter again")
                if (shape := self._stored[key].shape) != wanted:
                    raise InputError(
                        f"{self._file}: {key} has the shape {list(shape)}, a {self.family.name} of this size and rank "
                        f"{rank} needs {list(wanted)}; it is the adapter of another model"
                    )

    def _positions(self, every_module: Mapping[str, HuggingFaceModule]) -> dict[str, tuple[int, ...]]:
        """Positions of the adapted weights by Megatron's name of the module.

        Raises:
            InputError: a module has an adapter in some layers only.
        """
        positions: dict[str, set[int]] = {}
        for module in self.modules.values():
            positions.setdefault(module.megatron, set()).add(module.position)
        for name, module in every_module.items():
            if module.position in positions.get(module.megatron, ()) and name not in self.modules:
                raise InputError(
                    f"{self._file}: has no adapter on {name}, but on its like in other layers; an adapter must be on "
                    "every layer"
                )
        return {module: tuple(sorted(positions[module])) for module in SOURCES if module in positions}


def _wrapped(key: str) -> str | None:
    """Why a key is none that PEFT writes, by the usual causes; ``None`` for others."""
    if owners := wrappers_in(key):
        return f"named as {' and '.join(owners)} names it"
    if re.search(r"\.lora_[AB]\.[^.]+\.weight$", key):
        return "named as in the state dict of a whole PeftModel"
    if ".lora_" in key and (not key.startswith(_PREFIX) or key.startswith(_PREFIX * 2)):
        return f"does not begin with {_PREFIX} once"
    return None


def _header(folder: Path) -> dict[str, StoredWeight]:
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if any(folder.glob("adapter_model*.bin")):
        raise InputError(
            f"{folder}: its weights are no safetensors file; load the adapter with PEFT and write it again with "
            "save_pretrained"
        )
    raise InputError(f"{folder}: has no {WEIGHTS}; give the folder of a whole PEFT adapter")

"""Weights of a checkpoint that have an adapter, and the Hugging Face matrices that they are fused from.

::

    linear_qkv of one A                    A [r, in]    ─► A of q_proj, of k_proj and of v_proj: the same
                                           B [out, r]   ─► B of each: its rows

    linear_qkv of an A for q and one for   A [2·r, in]  ─► A as it is, of rank 2·r
    v, where Hugging Face has one matrix   B [out, r]   ─► B [out, 2·r]: each row in the columns of its A, 0 in others
    as well (GPT-NeoX)

    checkpoint                                             Hugging Face

The family's table gives the rows of each matrix in the weight; B has the same rows. The *sources* of a weight are those
of :mod:`mft_megatron.lora`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from mft_megatron.arguments.groups.network import NetworkArguments, stored_network
from mft_megatron.convert.huggingface.families.table import FAMILIES, family_for
from mft_megatron.convert.huggingface.family import Family
from mft_megatron.convert.huggingface.mapped_weight import MappedWeight
from mft_megatron.convert.huggingface.row_layouts import Block, Blocks, Sizes, glu, qkv, rows_of, sizes_of, split
from mft_megatron.errors import InputError
from mft_megatron.lora import LORA_A, LORA_B, Lora, Target
from mft_megatron.run_folder.description import CheckpointInfo

# A [rank, in] and B [out, rank] of a matrix [out, in]
Factors: TypeAlias = tuple[Tensor, Tensor]

# names in a checkpoint, without .weight, of the matrices that can have an adapter
PREFIXES = {
    "linear_qkv": "decoder.layers.self_attention.linear_qkv",
    "linear_proj": "decoder.layers.self_attention.linear_proj",
    "linear_fc1": "decoder.layers.mlp.linear_fc1",
    "linear_fc2": "decoder.layers.mlp.linear_fc2",
}


@dataclasses.dataclass(frozen=True)
class AdaptedMatrix:
    """A Hugging Face matrix with an adapter, in every layer.

    Attributes:
        name: name of the module, with ``{}`` for the layer.
        parts: indices of the checkpoint's A's that its rows have.
        shape: shape of the matrix.
    """

    name: str
    parts: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def leaf(self) -> str:
        """The last component of its name, by which PEFT finds it in every layer."""
        return self.name.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """A weight of a checkpoint with an adapter, in every layer.

    Attributes:
        mapped: the weight in the family's table.
        target: its sources and A's.
        rank: rank of one A.
        sources: rows of the weight by source.
        blocks: rows of the weight by Hugging Face matrix.
        shapes: shape of each Hugging Face matrix.
    """

    mapped: MappedWeight
    target: Target
    rank: int
    sources: Blocks
    blocks: Blocks
    shapes: tuple[tuple[int, ...], ...]

    @property
    def prefix(self) -> str:
        """The names of A and B in a checkpoint without their suffix."""
        return PREFIXES[self.target.module]

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of A and B of one layer, by name in the checkpoint."""
        columns = self.shapes[0][1]
        return {
            self.prefix + LORA_A: (len(self.target.parts) * self.rank, columns),
            self.prefix + LORA_B: (rows_of(self.blocks), self.rank),
        }

    @functools.cached_property
    def _part_of_rows(self) -> list[Tensor]:
        """For each Hugging Face matrix the index of the A of each row, int64 [rows]; -1 where it has none."""
        part_of = {source: index for index, part in enumerate(self.target.parts) for source in part}
        parts = [torch.full((block.rows,), part_of.get(block.source, -1)) for block in self.sources]
        return split(torch.cat(parts), self.blocks)

    @functools.cached_property
    def matrices(self) -> dict[int, AdaptedMatrix]:
        """Hugging Face matrices that have an adapter, by position in ``mapped.hf_names``."""
        adapted = {}
        for position, part_of_rows in enumerate(self._part_of_rows):
            parts = tuple(part for part in range(len(self.target.parts)) if (part_of_rows == part).any())
            if parts:
                adapted[position] = AdaptedMatrix(module_name(self.mapped, position), parts, self.shapes[position])
        return adapted

    def factors(self, a: Tensor, b: Tensor) -> dict[int, Factors]:
        """Convert A and B of one layer to those of the Hugging Face matrices; rows of B without an A are 0.

        Args:
            a: [parts · rank, in].
            b: [out, rank].

        Returns:
            A [n · rank, in] and B [out, n · rank] by position of the matrix, contiguous, in the dtype of ``b``; n is
            the number of A's that the matrix has.
        """
        b_of_matrices = split(b, self.blocks)
        converted = {}
        for position, matrix in self.matrices.items():
            narrow, part_of_rows = b_of_matrices[position], self._part_of_rows[position]
            wide = narrow.new_zeros(len(narrow), len(matrix.parts) * self.rank)
            for column, part in enumerate(matrix.parts):
                rows = part_of_rows == part
                wide[rows, column * self.rank : (column + 1) * self.rank] = narrow[rows]
            slices = [a[part * self.rank : (part + 1) * self.rank] for part in matrix.parts]
            converted[position] = torch.cat(slices), wide
        return converted


def adapted_weights(lora: Lora, family: Family, architecture: NetworkArguments) -> tuple[AdaptedWeight, ...]:
    """The weights of a model that ``lora`` adapts, in the order of its targets.

    Raises:
        InputError: a target is not in every layer, such as the MLP of a model with experts.
    """
    mapped, sizes = linear_weights(family, architecture), sizes_of(architecture, 0)
    adapted = []
    for target in lora.targets:
        weight = mapped.get(target.module)
        if weight is None:
            raise InputError(
                f"{target.module}: {family.name} has experts there, which cannot have adapters; those of attention can"
            )
        sources = source_blocks(target.module, architecture, sizes)
        shapes = tuple(weight.hf_shapes(sizes))
        adapted.append(AdaptedWeight(weight, target, lora.rank, sources, weight.blocks(sizes), shapes))
    return tuple(adapted)


def stacked_shapes(weights: Iterable[AdaptedWeight], num_layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all A's and B's by name in a checkpoint, where layers are stacked."""
    return {name: (num_layers, *shape) for weight in weights for name, shape in weight.factor_shapes().items()}


def linear_weights(family: Family, architecture: NetworkArguments) -> Mapping[str, MappedWeight]:
    """The weights of a model that can have an adapter, by Megatron's name of the module."""
    modules = {f"{prefix}.weight": module for module, prefix in PREFIXES.items()}
    return {modules[weight.name]: weight for weight in family.weights(architecture) if weight.name in modules}


def module_name(mapped: MappedWeight, position: int) -> str:
    """Name of a Hugging Face module, with ``{}`` for the layer, by position in ``mapped.hf_names``."""
    return mapped.hf_names[position].removesuffix(".weight")


def source_blocks(module: str, architecture: NetworkArguments, sizes: Sizes) -> Blocks:
    """Rows of the weight of ``module`` by source, whatever matrices the family has."""
    if module == "linear_qkv":
        return qkv(sizes)
    if module == "linear_fc1":
        return glu("ffn")(sizes) if architecture.gated else (Block(0, 0, sizes["ffn"]),)
    return (Block(0, 0, sizes["hidden"]),)


def family_of_info(info: CheckpointInfo) -> tuple[Family, NetworkArguments]:
    """Family and architecture of the model that a checkpoint's description names.

    Raises:
        InputError: no family can express the architecture.
    """
    architecture = stored_network(info.architecture, f"the checkpoint of iteration {info.iteration}")
    for family in FAMILIES.values():
        if family.architecture == info.source:
            return family, architecture
    return family_for(architecture), architecture

"""Where the adapters of a checkpoint are in a Hugging Face model, and how the matrices of one become the other's.

::

    ours   linear_qkv, one A    A [r, in]      ─► theirs   A of q_proj, of k_proj and of v_proj: the same
                                B [out, r]     ─►          B of each: rows by the blocks of the weight
    ours   an A of its own for q and for v, of a weight that is one matrix there, too (GPT-NeoX)
                                A [2·r, in]    ─► theirs   A as it is, of rank 2·r
                                B [out, r]     ─►          B [out, 2·r]: each row in the columns of its A, else 0

Which rows go where, the table of the family says for the weight; B has the same rows.
"""

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.families.table import FAMILIES, family_for
from mft_megatron.convert.huggingface.family import Family
from mft_megatron.convert.huggingface.mapped_weight import MappedWeight
from mft_megatron.convert.huggingface.row_layouts import Block, Blocks, Sizes, glu, qkv, rows_of, sizes_of, split
from mft_megatron.errors import InputError
from mft_megatron.lora import LORA_A, LORA_B, Lora, Target
from mft_megatron.run_folder import CheckpointInfo

# by module: where it is in a layer, without the layer
PLACES = {
    "linear_qkv": "decoder.layers.self_attention.linear_qkv",
    "linear_proj": "decoder.layers.self_attention.linear_proj",
    "linear_fc1": "decoder.layers.mlp.linear_fc1",
    "linear_fc2": "decoder.layers.mlp.linear_fc2",
}


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A Hugging Face matrix with an adapter.

    ``name``: of the module, with ``{}`` for the layer; ``parts``: which A's of ours serve its rows; ``shape``: of the
    weight.
    """

    name: str
    parts: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def leaf(self) -> str:
        """The last part of its name, by which PEFT finds it in every layer."""
        return self.name.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class AdaptedRow:
    """The adapter on one kind of weight, in all layers.

    ``row``: of the weight; ``sources``: its rows by our sources (:mod:`mft_megatron.lora`), ``blocks``: by Hugging
    Face's matrices.
    """

    row: MappedWeight
    target: Target
    rank: int
    sources: Blocks
    blocks: Blocks
    shapes: tuple[tuple[int, ...], ...]

    @property
    def ours(self) -> str:
        """What the names of A and B in a checkpoint begin with."""
        return PLACES[self.target.module]

    def our_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of A and B in the checkpoint, of one layer, by name."""
        columns = self.shapes[0][1]
        return {
            self.ours + LORA_A: (len(self.target.parts) * self.rank, columns),
            self.ours + LORA_B: (rows_of(self.blocks), self.rank),
        }

    @functools.cached_property
    def _served_by(self) -> list[Tensor]:
        """By Hugging Face's matrix and its rows: which A serves the row, -1 for none."""
        part_of = {source: number for number, part in enumerate(self.target.parts) for source in part}
        ours = [torch.full((block.rows,), part_of.get(block.source, -1)) for block in self.sources]
        return split(torch.cat(ours), self.blocks)

    @functools.cached_property
    def matrices(self) -> dict[int, Matrix]:
        """Hugging Face's matrices that have an adapter, by their number in the row."""
        found = {}
        for number, served_by in enumerate(self._served_by):
            parts = tuple(part for part in range(len(self.target.parts)) if (served_by == part).any())
            if parts:
                name = self.row.hf_names[number].removesuffix(".weight")
                found[number] = Matrix(name, parts, self.shapes[number])
        return found

    def factors(self, a: Tensor, b: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """A and B of Hugging Face's matrices, by number in the row; rows of B that no A serves are 0.

        Args:
            a: [parts · rank, in] of one layer.
            b: [out, rank] of the same.

        Returns:
            A [n · rank, in] and B [out, n · rank] of each, contiguous, n being how many A's serve it.
        """
        rows_of_b = split(b, self.blocks)
        found = {}
        for number, matrix in self.matrices.items():
            own, served_by = rows_of_b[number], self._served_by[number]
            theirs = own.new_zeros(len(own), len(matrix.parts) * self.rank)
            for at, part in enumerate(matrix.parts):
                served = served_by == part
                theirs[served, at * self.rank : (at + 1) * self.rank] = own[served]
            pieces = [a[part * self.rank : (part + 1) * self.rank] for part in matrix.parts]
            found[number] = torch.cat(pieces), theirs
        return found


def adapted_rows(lora: Lora, family: Family, architecture: NetworkArguments) -> tuple[AdaptedRow, ...]:
    """What is adapted of a model, in the order of ``lora.targets``.

    Raises:
        InputError: a target that the family has not in every layer, such as the MLP where there are experts.
    """
    weights, sizes = linear_rows(family, architecture), sizes_of(architecture, 0)
    found = []
    for target in lora.targets:
        row = weights.get(target.module)
        if row is None:
            raise InputError(
                f"{target.module}: {family.name} has experts there, which cannot have adapters; those of attention can"
            )
        sources = source_blocks(target.module, architecture, sizes)
        shapes = tuple(row.hf_shapes(sizes))
        found.append(AdaptedRow(row, target, lora.rank, sources, row.blocks(sizes), shapes))
    return tuple(found)


def linear_rows(family: Family, architecture: NetworkArguments) -> Mapping[str, MappedWeight]:
    """The rows of the matrices that can have adapters, by module."""
    modules = {f"{place}.weight": module for module, place in PLACES.items()}
    return {modules[row.name]: row for row in family.weights(architecture) if row.name in modules}


def source_blocks(module: str, architecture: NetworkArguments, sizes: Sizes) -> Blocks:
    """The rows of a matrix by our sources, whatever matrices the family has."""
    if module == "linear_qkv":
        return qkv(sizes)
    if module == "linear_fc1":
        return glu("ffn")(sizes) if architecture.gated else (Block(0, 0, sizes["ffn"]),)
    return (Block(0, 0, sizes["hidden"]),)


def family_of_info(info: CheckpointInfo) -> tuple[Family, NetworkArguments]:
    """Family and architecture that a checkpoint's description names.

    Raises:
        InputError: no family can express the architecture.
    """
    architecture = NetworkArguments(**info.architecture)
    for family in FAMILIES.values():
        if family.architecture == info.source:
            return family, architecture
    return family_for(architecture), architecture

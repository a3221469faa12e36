"""A PEFT adapter as adapters of ours: what they are, and any part of their matrices by its name in a checkpoint.

Every matrix with an adapter has an A of its own there. Where the A's of all that Megatron joins in one matrix are the
same in every layer, they are one A here, too. Where the matrix is one there as well, and a part of B's columns has
content in rows of queries alone, another in rows of values and so on, its A is several here. So what lora-to-peft wrote
comes back as it was.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mft_megatron.convert.huggingface.mapped_weight import MappedWeight
from mft_megatron.convert.huggingface.row_layouts import Block, Blocks, sizes_of, slice_blocks
from mft_megatron.errors import InputError
from mft_megatron.lora import LORA_A, LORA_B, Lora, Target, num_sources
from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from mft_megatron.run_folder import CheckpointInfo

from .adapter_rows import AdaptedRow, adapted_rows, family_of_info, linear_rows, source_blocks
from .config import PeftConfig, read_config
from .weights import PeftWeights


class AdapterSource:
    """``--hf-adapter DIR``. ``lora``: what the adapters are; :meth:`read`: their content, of ``dtype``; ``base``: the
    name of the model that they were trained on, if it is known."""

    def __init__(self, folder: str, info: CheckpointInfo):
        """
        Args:
            folder: of ``adapter_config.json`` and ``adapter_model.safetensors``.
            info: description of the model that it is to be beside.

        Raises:
            InputError: it is no LoRA adapter of such a model, on every layer and of one rank, or is not whole.
        """
        self.folder = Path(folder)
        self.family, self.architecture = family_of_info(info)
        config = read_config(self.folder)
        self._weights = PeftWeights(self.folder, config, self.family, self.architecture)
        self.base, self.dtype = config.base, self._weights.dtype
        self._of_linear = linear_rows(self.family, self.architecture)
        targets = tuple(self._target(module, numbers) for module, numbers in self._weights.numbers.items())
        rank, alpha = self._one_rank(targets, config)
        self.lora = Lora(rank, alpha, targets, config.dropout, config.rslora)
        self._rows = {row.ours: row for row in adapted_rows(self.lora, self.family, self.architecture)}

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.lora.scale

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all its matrices as a checkpoint has them, by name; layers are stacked."""
        layers = self.architecture.num_layers
        return {name: (layers, *shape) for row in self._rows.values() for name, shape in row.our_shapes().items()}

    def read(self, wanted: WeightSlice) -> Tensor:
        """Read one slice of A or B, named ``….lora_a`` or ``….lora_b`` as in a checkpoint.

        Returns:
            its content, on the CPU, in :attr:`dtype`; rows of B that have no adapter are 0.

        Raises:
            InputError: the adapter is on other matrices.
        """
        name, place = wanted.name, wanted.index
        row = self._rows.get(name.removesuffix(LORA_A).removesuffix(LORA_B))
        if row is None:
            raise InputError(f"{self.folder}: has no {name}; it is {self.lora.describe()}")
        rows, columns = wanted.region
        if name.endswith(LORA_A):
            return self._read(row, "A", self._blocks_of_a(row), place, rows, columns)
        if len(row.target.parts) == 1 or len(row.row.hf_names) > 1:
            return self._read(row, "B", row.blocks, place, rows, columns)
        # one matrix there and several A's here: of each row the columns of its own A
        wide = self._read(row, "B", row.blocks, place, rows, slice(0, len(row.target.parts) * self.lora.rank))
        content, at = torch.zeros(wanted.shape, dtype=self.dtype), 0
        for block in slice_blocks(row.sources, rows.start, rows.stop):
            for number, sources in enumerate(row.target.parts):
                if block.source in sources:
                    own = wide[at : at + block.rows, number * self.lora.rank :]
                    content[at : at + block.rows] = own[:, columns]
            at += block.rows
        return content

    def factors(self, weight: str) -> tuple[Tensor, Tensor] | None:
        """A and B of a Hugging Face weight by its name, ``None`` for one that has no adapter."""
        module = weight.removesuffix(".weight")
        if not self._weights.has(module):
            return None
        return self._weights.whole(module, "A"), self._weights.whole(module, "B")

    def _read(
        self, row: AdaptedRow, letter: str, blocks: Blocks, place: tuple[int, ...], rows: slice, columns: slice
    ) -> Tensor:
        """Rows that are made of those of their matrices by ``blocks``; 0 of a matrix that has no adapter."""
        content = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=self.dtype)
        at = 0
        for block in slice_blocks(blocks, rows.start, rows.stop):
            if block.source in self._weights.numbers[row.target.module]:
                theirs = slice(block.start, block.start + block.rows)
                module = _module(row.row, block.source, place[0])
                content[at : at + block.rows] = self._weights.part(module, letter, theirs, columns)
            at += block.rows
        return content

    def _blocks_of_a(self, row: AdaptedRow) -> Blocks:
        """Which matrices of theirs the rows of A come from."""
        numbers, parts = self._weights.numbers[row.target.module], len(row.target.parts)
        if len(row.row.hf_names) == 1:
            return (Block(0, 0, parts * self.lora.rank),)
        return tuple(Block(number, 0, self.lora.rank) for number in numbers[:parts])

    def _one_rank(self, targets: Sequence[Target], config: PeftConfig) -> tuple[int, float]:
        """Rank and alpha of each A, which must be those of all."""
        # of a matrix that is several of ours, what lora-to-peft made of them is undone
        joined = {t.module: len(t.parts) for t in targets if len(self._of_linear[t.module].hf_names) == 1}
        found = set()
        for name, (row, _, _) in self._weights.modules.items():
            count = joined.get(row.name.split(".")[-2], 1)
            alpha = config.alpha_of(name) / (math.sqrt(count) if config.rslora else count)
            found.add((config.rank_of(name) // count, round(alpha, 9)))
        if len(found) > 1:
            shown = " and ".join(f"rank {rank} with alpha {alpha:g}" for rank, alpha in sorted(found)[:3])
            raise InputError(
                f"{self.folder}: its matrices have several ranks or alphas ({shown}; rank_pattern, alpha_pattern), "
                "which cannot be expressed; train one with the same everywhere"
            )
        return found.pop()

    def _target(self, module: str, numbers: Sequence[int]) -> Target:
        """What of ours stands for an adapter on those of a row's matrices."""
        row, sources = self._of_linear[module], num_sources(module, self.architecture.gated)
        if len(row.hf_names) == 1:
            return Target(module, sources, self._parts(module, row, sources))
        if len(numbers) == len(row.hf_names) and self._same_a(row, numbers):
            return Target(module, sources, (tuple(range(sources)),))
        return Target(module, sources, tuple((number,) for number in numbers))

    def _same_a(self, row: MappedWeight, numbers: Sequence[int]) -> bool:
        """Whether one A serves all, bit for bit, in every layer."""
        for layer in range(self.architecture.num_layers):
            first, *others = (self._weights.whole(_module(row, number, layer), "A") for number in numbers)
            same = (other.dtype == first.dtype and other.equal(first) for other in others)
            if not all(same):
                return False
        return True

    def _parts(self, module: str, row: MappedWeight, sources: int) -> tuple[tuple[int, ...], ...]:
        """Of a matrix that is one on both sides: which of our sources each part of the rank serves."""
        used = None
        for layer in range(self.architecture.num_layers if sources > 1 else 0):
            b = self._weights.whole(_module(row, 0, layer), "B")
            here = torch.zeros(sources, b.shape[1], dtype=torch.bool)
            at = 0
            for block in source_blocks(module, self.architecture, sizes_of(self.architecture, 0)):
                here[block.source] |= (b[at : at + block.rows] != 0).any(0)
                at += block.rows
            used = here if used is None else used | here
        for count in range(sources, 1, -1):  # [source, part]: whether it has content there
            if used is not None and used.shape[1] % count == 0:
                found = used.view(sources, count, -1).any(2)
                if (found.sum(1) <= 1).all() and (found.sum(0) == 1).all():
                    return tuple(tuple(found[:, number].nonzero().flatten().tolist()) for number in range(count))
        return (tuple(range(sources)),)


def _module(row: MappedWeight, number: int, layer: int) -> str:
    return row.hf_names[number].removesuffix(".weight").format(layer)

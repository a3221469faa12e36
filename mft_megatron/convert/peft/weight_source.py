"""A PEFT adapter as the adapters of a checkpoint: any slice of their A's and B's, by name in a checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from mft_megatron.convert.huggingface.row_layouts import Block, Blocks, slice_blocks
from mft_megatron.errors import InputError
from mft_megatron.lora import LORA_A, LORA_B
from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from mft_megatron.run_folder.description import CheckpointInfo

from .adapted_weights import AdaptedWeight, Factors, adapted_weights, family_of_info
from .config import read_config
from .inferred_lora import infer_lora
from .weights import Letter, PeftWeights


class AdapterSource:
    """The adapter of ``--hf-adapter DIR``, as a :class:`WeightSource`.

    Attributes:
        folder: folder of the adapter.
        base: name of the model that it was trained on, empty if it is unknown.
        lora: description of the adapters.
        dtype: dtype of their weights.
        weights: the adapted weights of the checkpoint.
    """

    def __init__(self, folder: str, info: CheckpointInfo):
        """Open an adapter and check that it fits a model.

        Args:
            folder: folder of ``adapter_config.json`` and ``adapter_model.safetensors``.
            info: description of the model that the adapters belong to.

        Raises:
            InputError: it is incomplete, or no LoRA adapter of such a model, on every layer and of one rank.
        """
        self.folder = Path(folder)
        family, architecture = family_of_info(info)
        config = read_config(self.folder)
        self._peft = PeftWeights(self.folder, config, family, architecture)
        self.base, self.dtype = config.base, self._peft.dtype
        self.lora = infer_lora(self._peft, config)
        self.weights = adapted_weights(self.lora, family, architecture)
        self._by_prefix = {weight.prefix: weight for weight in self.weights}

    def read(self, wanted: WeightSlice) -> Tensor:
        """Read one slice of A or B, named ``….lora_a`` or ``….lora_b`` as in a checkpoint.

        Returns:
            its content, on the CPU, in :attr:`dtype`; rows of B that have no adapter are 0.

        Raises:
            InputError: the adapter is on other matrices.
        """
        weight = self._by_prefix.get(wanted.name.removesuffix(LORA_A).removesuffix(LORA_B))
        if weight is None:
            raise InputError(f"{self.folder}: has no {wanted.name}; it is {self.lora.describe()}")
        (layer,), (rows, columns) = wanted.index, wanted.region
        if wanted.name.endswith(LORA_A):
            return self._read(weight, "A", self._blocks_of_a(weight), layer, rows, columns)
        num_parts = len(weight.target.parts)
        if num_parts == 1 or len(weight.mapped.hf_names) > 1:
            return self._read(weight, "B", weight.blocks, layer, rows, columns)
        # a fused matrix with several A's in the checkpoint: of each row of B the columns of its A
        wide = self._read(weight, "B", weight.blocks, layer, rows, slice(0, num_parts * self.lora.rank))
        content, filled = torch.zeros(wanted.shape, dtype=self.dtype), 0
        for block in slice_blocks(weight.sources, rows.start, rows.stop):
            for part, sources in enumerate(weight.target.parts):
                if block.source in sources:
                    of_part = wide[filled : filled + block.rows, part * self.lora.rank :]
                    content[filled : filled + block.rows] = of_part[:, columns]
            filled += block.rows
        return content

    def factors(self, hf_name: str) -> Factors | None:
        """Read A [rank, in] and B [out, rank] of a Hugging Face weight; ``None`` if it has no adapter."""
        module = hf_name.removesuffix(".weight")
        if module not in self._peft.modules:
            return None
        return self._peft.whole(module, "A"), self._peft.whole(module, "B")

    def _read(
        self, weight: AdaptedWeight, letter: Letter, blocks: Blocks, layer: int, rows: slice, columns: slice
    ) -> Tensor:
        """Read rows that ``blocks`` make of the rows of Hugging Face matrices; 0 of a matrix without an adapter."""
        content = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=self.dtype)
        module, filled = weight.target.module, 0
        for block in slice_blocks(blocks, rows.start, rows.stop):
            if block.source in self._peft.positions[module]:
                name = self._peft.module(module, block.source, layer)
                block_rows = slice(block.start, block.start + block.rows)
                content[filled : filled + block.rows] = self._peft.part(name, letter, block_rows, columns)
            filled += block.rows
        return content

    def _blocks_of_a(self, weight: AdaptedWeight) -> Blocks:
        """Hugging Face matrices that the rows of A come from."""
        positions, num_parts = self._peft.positions[weight.target.module], len(weight.target.parts)
        if len(weight.mapped.hf_names) == 1:
            return (Block(0, 0, num_parts * self.lora.rank),)
        return tuple(Block(position, 0, self.lora.rank) for position in positions[:num_parts])

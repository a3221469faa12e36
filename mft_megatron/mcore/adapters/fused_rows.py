"""Rows of Megatron-Core's fused matrices and the Hugging Face matrices that they come from."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def source_of_rows(module: str, config: TransformerConfig, rows: int) -> Tensor:
    """Index of the Hugging Face matrix that each row of this rank's shard comes from, as in :mod:`mft_megatron.lora`.

    The rows of one Hugging Face matrix keep its order, within a rank and from one tensor-parallel rank to the next.

    Args:
        module: ``linear_qkv``, ``linear_proj``, ``linear_fc1`` or ``linear_fc2``.
        config: the model's configuration.
        rows: rows of the shard.

    Returns:
        int64 [rows].
    """
    if module == "linear_qkv":
        # group by group: its query heads, its key head, its value head
        head = config.kv_channels
        sizes = [config.num_attention_heads // config.num_query_groups * head, head, head]
    elif module == "linear_fc1" and config.gated_linear_unit:
        sizes = [rows // 2, rows // 2]
    else:
        sizes = [rows]
    pattern = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return pattern.repeat(rows // len(pattern))

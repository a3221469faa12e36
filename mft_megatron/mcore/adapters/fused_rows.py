"""Of which of Hugging Face's matrices the rows of a matrix of Megatron-Core's are."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def source_of_rows(module: str, config: TransformerConfig, rows: int) -> Tensor:
    """The source of each row of this rank's part; :mod:`mft_megatron.lora` numbers them.

    The rows of a source are in Hugging Face's order, from one tensor-parallel rank to the next, too.

    Args:
        module: ``linear_qkv``, ``linear_proj``, ``linear_fc1`` or ``linear_fc2``.
        config: of the model.
        rows: how many rows the part has.

    Returns:
        int64 [rows].
    """
    if module == "linear_qkv":
        # one group after the other: its query heads, its key head, its value head
        head = config.kv_channels
        sizes = [config.num_attention_heads // config.num_query_groups * head, head, head]
    elif module == "linear_fc1" and config.gated_linear_unit:
        sizes = [rows // 2, rows // 2]
    else:
        sizes = [rows]
    pattern = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return pattern.repeat(rows // len(pattern))

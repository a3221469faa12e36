"""Word embeddings scaled by the hidden size before the first layer, as Gemma's are.

The output layer, which may share the weights, uses them unscaled.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor


class ScaledEmbedding(VocabParallelEmbedding):
    """Megatron's embedding times √hidden size, rounded to the weights' dtype: 55.5 for 3,072 in bf16, not 55.43."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed ids, int32 or int64 [B, S] -> [B, S, hidden], or [S / TP, B, hidden] under sequence parallelism."""
        return super().forward(input_ids) * scale(self.embedding_dim, self.weight.dtype)


def scale(hidden_size: int, dtype: torch.dtype) -> float:
    """Round √hidden_size to ``dtype``."""
    return torch.tensor(hidden_size**0.5).to(dtype).item()

"""Word embeddings that enter the layers larger than they are stored, as Gemma's do.

The output layer, which may share the weights, takes them as they are.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor


class ScaledEmbedding(VocabParallelEmbedding):
    """Megatron's embedding times √hidden size, a factor of the weights' dtype: 55.5 for 3,072 in bf16, not 55.43."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, hidden], or [S / TP, B, hidden] under sequence parallelism."""
        return super().forward(input_ids) * scale(self.embedding_dim, self.weight.dtype)


def scale(hidden_size: int, dtype: torch.dtype) -> float:
    """√hidden_size as ``dtype`` holds it."""
    return torch.tensor(hidden_size**0.5).to(dtype).item()

"""RMSNorm and LayerNorm for any layout.

Megatron-Core's own norm without Transformer Engine and apex refuses sequence parallelism. All that it takes is the mark
on the weight: under sequence parallelism each rank sees part of the tokens, and gradients of marked weights are summed.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _Marked:
    def _mark(self, config: TransformerConfig) -> None:
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


class RMSNorm(torch.nn.RMSNorm, _Marked):
    """Root-mean-square norm, computed in fp32 whatever the input's dtype."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self._mark(config)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = torch.nn.functional.rms_norm(hidden.float(), self.normalized_shape, None, self.eps)
        return normed.to(hidden.dtype) * self.weight


class LayerNorm(torch.nn.LayerNorm, _Marked):
    """Layer norm with weight and bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self._mark(config)


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}

"""RMSNorm and LayerNorm for any layout.

Megatron-Core's own norm without Transformer Engine and apex refuses sequence parallelism. All that it takes is the mark
on the weight: under sequence parallelism each rank sees part of the tokens, and gradients of marked weights are summed.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _Marked:
    """``shift``: what is added to the stored weight: 1 with ``--apply-layernorm-1p``."""

    def _mark(self, config: TransformerConfig) -> None:
        self.shift = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        if self.shift:
            torch.nn.init.zeros_(self.weight)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def scale(self) -> Tensor:
        """What normalised hidden states are multiplied by."""
        return self.weight + self.shift if self.shift else self.weight


class RMSNorm(torch.nn.RMSNorm, _Marked):
    """Root-mean-square norm, computed in fp32 whatever the input's dtype."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self._mark(config)

    def forward(self, hidden: Tensor) -> Tensor:
        # a node of its own before the norm's several uses of it, so that their gradients are added up before the
        # residual stream's comes in: then a norm that is computed again gives the same gradient, bit for bit
        hidden = hidden.view_as(hidden)
        normed = torch.nn.functional.rms_norm(hidden.float(), self.normalized_shape, None, self.eps)
        return normed.to(hidden.dtype) * self.scale()


class LayerNorm(torch.nn.LayerNorm, _Marked):
    """Layer norm with weight and bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self._mark(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(hidden, self.normalized_shape, self.scale(), self.bias, self.eps)


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}

"""RMSNorm and LayerNorm for any layout.

Megatron-Core's own norm without Transformer Engine and apex refuses sequence parallelism. All that it takes is the mark
on the weight: under sequence parallelism each rank sees part of the tokens, and gradients of marked weights are summed.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

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
        if self.shift:
            # as Gemma and Transformer Engine do: 1 + weight in bf16 would lose the digits that the storage is for
            return (normed * (self.weight.float() + self.shift)).to(hidden.dtype)
        return normed.to(hidden.dtype) * self.weight


class LayerNorm(torch.nn.LayerNorm, _Marked):
    """Layer norm with weight and bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self._mark(config)

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.shift:
            return torch.nn.functional.layer_norm(hidden, self.normalized_shape, self.weight, self.bias, self.eps)
        weight, bias = self.weight.float() + self.shift, self.bias.float()
        normed = torch.nn.functional.layer_norm(hidden.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(hidden.dtype)


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}

"""RMSNorm and LayerNorm for any parallel layout.

Without Transformer Engine and apex, Megatron-Core's norm refuses sequence parallelism. A mark on the weight is enough:
under sequence parallelism each rank has part of the tokens, and Megatron-Core sums the gradients of marked weights.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def _widened(value: Tensor) -> Tensor:
    """Convert to fp32 for computing; fp64, in which references of the engine are computed, stays."""
    return value if value.dtype == torch.float64 else value.float()


def _weight_shift(norm: torch.nn.Module, config: TransformerConfig) -> float:
    """Mark a norm's parameters for sequence parallelism and return what is added to its stored weight.

    That is 1 with ``--apply-layernorm-1p``, where the stored weight is initialised to 0, and 0 otherwise.
    """
    for parameter in norm.parameters():
        # Megatron-Core reads this attribute of a parameter
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    if not config.layernorm_zero_centered_gamma:
        return 0.0
    torch.nn.init.zeros_(norm.get_parameter("weight"))
    return 1.0


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm, computed in fp32 if the input's dtype is a smaller one."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        """Allocate the weight; Megatron-Core builds norms with these arguments."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.shift = _weight_shift(self, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise [..., hidden size]; the result has the weight's dtype.

        The input, a residual stream in fp32, may have another.
        """
        # The view is an autograd node before the norm's several uses of the input, so that their gradients are added
        # before the residual stream's gradient: then a recomputed norm gives the same gradient, bit for bit.
        hidden = hidden.view_as(hidden)
        normed = torch.nn.functional.rms_norm(_widened(hidden), self.normalized_shape, None, self.eps)
        if self.shift:
            # in fp32 as in Gemma and Transformer Engine: 1 + weight in bf16 would lose the digits that are stored
            return (normed * (_widened(self.weight) + self.shift)).to(self.weight.dtype)
        return normed.to(self.weight.dtype) * self.weight


class LayerNorm(torch.nn.LayerNorm):
    """Layer norm with weight and bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        """Allocate weight and bias; Megatron-Core builds norms with these arguments."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.shift = _weight_shift(self, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise [..., hidden size]; the result has the weight's dtype.

        The input, a residual stream in fp32, may have another.
        """
        if not self.shift and hidden.dtype == self.weight.dtype:
            return torch.nn.functional.layer_norm(hidden, self.normalized_shape, self.weight, self.bias, self.eps)
        weight, bias = _widened(self.weight) + self.shift, _widened(self.bias)
        normed = torch.nn.functional.layer_norm(_widened(hidden), self.normalized_shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}

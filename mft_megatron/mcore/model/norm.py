"""RMSNorm and LayerNorm for any parallel layout.

Without Transformer Engine and apex, Megatron-Core's norm refuses sequence parallelism. A mark on the weight is enough:
under sequence parallelism each rank has part of the tokens, and Megatron-Core sums the gradients of marked weights.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mft_megatron.mcore.kernels.layer_norm import layer_norm
from mft_megatron.mcore.kernels.rms_norm import rms_norm


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
        self.norm_eps = eps
        self.shift = _weight_shift(self, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise [..., hidden size]; the result has the weight's dtype.

        The input, a residual stream in fp32, may have another.
        """
        return rms_norm(hidden, self.weight, self.norm_eps, self.shift)


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
        return layer_norm(hidden, self.weight, self.bias, self.eps, self.shift)


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}

"""A layer whose MLP reads what the layer was given, beside attention instead of after it, as in GPT-NeoX."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class ParallelResidualLayer(TransformerLayer):
    """``x + attention(norm(x)) + mlp(norm(x))``, each norm with weights of its own, for input ``x``.

    Megatron's is ``y + mlp(norm(y))`` with ``y = x + attention(norm(x))``. Only the input of the norm before the MLP is
    another one; what is added up, and in which order, stays Megatron's.
    """

    def _forward_attention(self, hidden_states: Tensor, *args, **others) -> tuple:
        self._given = hidden_states
        return super()._forward_attention(hidden_states, *args, **others)

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        given, self._given = self._given, None
        return super()._forward_pre_mlp_layernorm(given)

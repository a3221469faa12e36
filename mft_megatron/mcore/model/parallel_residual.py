"""A layer whose MLP reads the layer's input, in parallel with attention instead of after it, as in GPT-NeoX."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class ParallelResidualLayer(TransformerLayer):
    """Layer that outputs ``x + attention(norm(x)) + mlp(norm(x))`` for input ``x``; the norms have separate weights.

    Megatron's layer computes ``y + mlp(norm(y))`` with ``y = x + attention(norm(x))``. Only the input of the norm
    before the MLP differs; the additions and their order stay Megatron's.
    """

    _layer_input: Tensor | None = None

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **others: Any) -> tuple:
        self._layer_input = hidden_states
        return super()._forward_attention(hidden_states, *args, **others)

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        layer_input, self._layer_input = self._layer_input, None
        return super()._forward_pre_mlp_layernorm(layer_input)

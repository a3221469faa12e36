"""Attention within each segment of a packed stream.

A micro-batch arrives as one stream of tokens cut into segments. Each segment attends causally to itself alone: other
segments are not even passed in, so a sample's result does not depend on its neighbours and no work is done on masked
blocks. Where context-parallel ranks share the stream, keys and values are gathered first
(:mod:`.parallel.context_parallel`).

The kernel is one of several (:mod:`.sdpa` runs everywhere). Megatron-Core's own attention without Transformer Engine
knows no packing, and on CUDA its fused softmax would ignore an explicit mask.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
import dataclasses

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from mft_megatron.mcore.parallel.context_parallel import ContextParallelShard

from .backends import choose, shape_of


@dataclasses.dataclass
class PackedStream(PackedSeqParams):
    """What Megatron hands through its layers to attention: the rank's shard and the positions of its tokens.

    To Megatron it is no ``thd``: it would then want to rotate, and cut, each segment for itself.
    """

    qkv_format: str = "sbhd"
    shard: ContextParallelShard | None = None
    positions: Tensor | None = None


class PackedAttention(torch.nn.Module):
    """Core attention of a stream: query [T, 1, heads, d], key and value [T, 1, groups, d] -> [T, 1, heads · d].

    T counts the tokens of this context-parallel rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        backend: str = "auto",
    ):
        """
        Args:
            layer_number: in the whole model, from 1 on; says whether the layer has a window.
            backend: ``--attention-backend``.

        Raises:
            InputError: that kernel cannot compute this, or not here.
        """
        super().__init__()
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"only causal self-attention, not {attn_mask_type} {attention_type} attention")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.sequence_parallel = config.sequence_parallel
        self.scale = softmax_scale
        self.window = _window(config, layer_number)
        self.kernel = choose(backend, shape_of(config, self.dropout)).kernel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedStream | None = None,
    ) -> Tensor:
        shard = packed_seq_params.shard
        key, value = shard.gather(key.squeeze(1), value.squeeze(1))
        dropout = self.dropout if self.training else 0.0
        # Heads are split over tensor-parallel ranks, so each draws dropout of its own. Under sequence parallelism the
        # whole block does, and a fork within a fork would draw other numbers where the layer is computed again.
        forks = dropout and not self.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if forks else contextlib.nullcontext():
            output = self.kernel(query.squeeze(1), key, value, shard.spans, self.scale, self.window, dropout)
        return output.flatten(1).unsqueeze(1)


def _window(config: TransformerConfig, layer_number: int) -> int | None:
    """How many tokens to its left a token of this layer sees besides itself; ``None`` for all of its segment."""
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return config.window_size[0] if windowed and config.window_size[0] >= 0 else None

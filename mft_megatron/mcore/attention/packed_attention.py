"""Attention within each segment of a packed stream.

A micro-batch arrives as one stream of tokens cut into segments. Each segment attends causally to itself alone: other
segments are not passed to the kernel, so a sample's result does not depend on its neighbours and no work is done on
masked blocks. Under context parallelism keys and values are gathered first (:mod:`.parallel.context_parallel`).

The kernel is one of several (:mod:`.backends`). Megatron-Core's own attention without Transformer Engine does not
support packing, and on CUDA its fused softmax would ignore an explicit mask.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
import dataclasses

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from mft_megatron.mcore.kernels.rotary import Rotation, rotate
from mft_megatron.mcore.parallel.context_parallel import ContextParallelShard
from mft_megatron.mcore.platform import devices

from .backends import choose, shape_of


@dataclasses.dataclass
class PackedStream(PackedSeqParams):
    """The argument that Megatron passes through its layers to attention.

    Attributes:
        qkv_format: not ``thd``, for which Megatron would rotate and cut each segment itself.
        shard: this rank's part of the micro-batch, for :class:`PackedAttention`.
        rotation: of queries and keys of the rank's tokens; ``None`` without rotary embedding.
    """

    qkv_format: str = "sbhd"
    shard: ContextParallelShard | None = None
    rotation: Rotation | None = None


class PackedAttention(torch.nn.Module):
    """Core attention of a stream, in place of Megatron-Core's ``DotProductAttention``."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        backend: str = "auto",
    ):
        """Choose the kernel and the window; all arguments but the last are Megatron's.

        Args:
            config: of the model.
            layer_number: in the whole model, from 1 on; determines whether the layer has a window.
            attn_mask_type: has to be causal.
            attention_type: has to be ``self``.
            attention_dropout: probability; ``None`` for the configuration's.
            softmax_scale: ``None`` for ``1 / sqrt(d)``.
            cp_comm_type: not used.
            pg_collection: not used.
            backend: ``--attention-backend``.

        Raises:
            ValueError: the attention is not causal self-attention.
            InputError: the kernel cannot compute this, or not on this machine.
        """
        super().__init__()
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"only causal self-attention, not {attn_mask_type} {attention_type} attention")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.sequence_parallel = config.sequence_parallel
        self.scale = softmax_scale
        self.window = _window(config, layer_number)
        # Values are a slice of the linear layer's output and would keep all of it, beside rotated queries and keys.
        # Norms of queries and keys keep it anyway.
        self.copies_values = not config.qk_layernorm
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
        """Compute attention of the T tokens of this context-parallel rank.

        Args:
            query: [T, 1, heads, d].
            key: [T, 1, groups, d].
            value: [T, 1, groups, d].
            attention_mask: not used; the segments say what a token sees.
            attn_mask_type: not used.
            attention_bias: not used.
            packed_seq_params: the stream's segments.

        Returns:
            [T, 1, heads · d].

        Raises:
            ValueError: there is no stream.
        """
        if packed_seq_params is None or packed_seq_params.shard is None:
            raise ValueError("attention of packed rows needs a PackedStream with a shard")
        shard = packed_seq_params.shard
        query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
        if packed_seq_params.rotation is not None:
            query, key = (rotate(tensor, packed_seq_params.rotation) for tensor in (query, key))
            if self.copies_values and devices.on_gpu(value):
                value = value.contiguous()
        key, value = shard.gather(key, value)
        dropout = self.dropout if self.training else 0.0
        # Heads are split over tensor-parallel ranks, so each needs its own random numbers for dropout. Under sequence
        # parallelism Megatron has forked the random state around the whole block, and a fork within a fork would give
        # other numbers where the layer is recomputed.
        forks = dropout and not self.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if forks else contextlib.nullcontext():
            output = self.kernel(query, key, value, shard.spans, self.scale, self.window, dropout)
        return output.flatten(1).unsqueeze(1)


def _window(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens to the left of its position that a query of this layer sees; ``None`` for all of its segment."""
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return config.window_size[0] if windowed and config.window_size[0] >= 0 else None

"""Attention kernels of CUDA devices, each with the signature and the result of :func:`.sdpa.local`, in bf16 or fp16.

All of them align a slice's last query with its last key, and count a window in tokens to the left of the query's.
"""

import inspect
from typing import Any, cast

import torch
from torch import Tensor

from mft_megatron.arguments.values.attention import AttentionShape
from mft_megatron.errors import InputError
from mft_megatron.mcore.parallel.attention_spans import Spans


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute :func:`.sdpa.local` with the FlashAttention that is built into torch, without dropout.

    Raises:
        ValueError: dropout is wanted.
    """
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError(f"torch.nn.attention.varlen has no dropout, not {dropout}")
    query, key, value = map(_dense_heads, (query, key, value))
    output = varlen_attn(
        query,
        key,
        value,
        spans.cu_q,
        spans.cu_k,
        spans.max_q,
        spans.max_k,
        **_varlen_options(scale, window, grouped_queries=query.shape[1] != key.shape[1]),
    )
    return cast(Tensor, output)  # a tuple only with return_aux


def lacking_of_varlen(shape: AttentionShape) -> str | None:
    """Say what :func:`varlen` needs for an attention and this torch lacks, with the remedy; ``None`` if it has all.

    The options came one release after another: none in torch 2.10, grouped queries last, in 2.12.
    """
    remedy = "install torch 2.12 or newer, or use flash or local"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return f"is not in this torch {torch.__version__} ({error}); {remedy}"
    needed = _varlen_options(None, shape.window, shape.grouped_queries)
    absent = sorted(needed.keys() - inspect.signature(varlen_attn).parameters.keys())
    return f"has no {', '.join(absent)} in this torch {torch.__version__}; {remedy}" if absent else None


def _varlen_options(scale: float | None, window: int | None, grouped_queries: bool) -> dict[str, Any]:
    """Options of ``varlen_attn``, with ``enable_gqa`` only where it is needed, because it came last."""
    options: dict[str, Any] = {"scale": scale, "window_size": _window(window)}
    return options | ({"enable_gqa": True} if grouped_queries else {})


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute :func:`.sdpa.local` with the package flash-attn."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        spans.cu_q,
        spans.cu_k,
        spans.max_q,
        spans.max_k,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=_window(window),
        # as torch's own kernels and Transformer Engine's follow the same switch
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


class Fused:
    """cuDNN's attention through Transformer Engine; no dropout with a window or with fewer queries than keys.

    Transformer Engine's module takes sizes, scale and dropout when it is built, so there is one for each combination.
    They are no submodules of the model, so that checkpoints hold nothing of them.
    """

    def __init__(self) -> None:
        self._modules: dict[tuple[int, int, int, float | None, float], Any] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: Spans,
        scale: float | None = None,
        window: int | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Compute :func:`.sdpa.local`.

        Raises:
            InputError: cuDNN has no kernel for this.
        """
        attention = self._module(query.shape[1], key.shape[1], query.shape[2], scale, dropout)
        # Without gradients less is saved; but a layer that is recomputed has to drop the same weights both times.
        attention.train(torch.is_grad_enabled() or dropout > 0)
        # If both masks are the same, cuDNN has more kernels for the one that is aligned at the start.
        whole = spans.lengths_q == spans.lengths_k
        try:
            output = attention(
                *map(_dense_heads, (query, key, value)),
                qkv_format="thd",
                attn_mask_type="padding_causal" if whole else "padding_causal_bottom_right",
                cu_seqlens_q=spans.cu_q,
                cu_seqlens_kv=spans.cu_k,
                max_seqlen_q=spans.max_q,
                max_seqlen_kv=spans.max_k,
                window_size=_window(window),
            )
        except ValueError as error:
            if "backend" not in str(error):
                raise
            raise InputError(
                f"--attention-backend fused: Transformer Engine finds no kernel of cuDNN for this ({error}); use "
                "flash, varlen or local",
                always=True,
            ) from error
        return output.view(query.shape)

    def _module(self, heads: int, groups: int, size: int, scale: float | None, dropout: float) -> Any:
        arguments = (heads, groups, size, scale, dropout)
        if arguments not in self._modules:
            from transformer_engine.pytorch import DotProductAttention

            # Only this rank's heads; the caller forks the random state for dropout.
            self._modules[arguments] = DotProductAttention(
                heads, size, num_gqa_groups=groups, attention_dropout=dropout, qkv_format="thd", softmax_scale=scale
            )
        return self._modules[arguments]


def _window(window: int | None) -> tuple[int, int]:
    """Tokens that a query sees to the left and to the right of its position; -1: all."""
    return (-1 if window is None else window, 0)


def _dense_heads(tensor: Tensor) -> Tensor:
    """Copy a tensor [tokens, heads, d] whose last dimension is not contiguous, as the kernels need it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

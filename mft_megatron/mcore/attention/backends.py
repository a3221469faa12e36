"""Which kernel computes attention, and why not another one.

::

    query, key, value, spans ─► local | varlen | flash | fused ─► [queries, heads, d]

=======  =====================================================================================================
local    PyTorch's scaled dot-product attention, piece by piece (:mod:`.attention.sdpa`): everywhere, in any dtype
varlen   ``torch.nn.attention.varlen``: FlashAttention 2 as it is built into torch
flash    the package flash-attn: FlashAttention 2, with dropout
fused    cuDNN's attention through Transformer Engine
=======  =====================================================================================================

``auto`` takes flash where that package works, else varlen, else local. The first two are the same kernels; the package
comes first because it has dropout and is newer than what torch was built with, and because who compiled it wants it.
Never fused: Transformer Engine's choice depends on versions of cuDNN and on variables of the environment, so that a
run would not know from its options what computes it; and no kernel is taken that is not compared with local by
``tests/gpu``. On the CPU and in fp32 it is local.

All of them align a piece's last query with its last key, and count a window in tokens to the left besides oneself.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mft_megatron.arguments.values.attention import BACKENDS, AttentionShape, limit_of
from mft_megatron.errors import InputError
from mft_megatron.mcore.parallel.attention_spans import Spans
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.optional_packages import FLASH_ATTN, TRANSFORMER_ENGINE, missing
from mft_megatron.mcore.platform.precisions import BY_DTYPE

from .sdpa import local

# (query, key, value, spans, scale, window, dropout) -> like query; see :func:`.attention.sdpa.local`
Kernel = Callable[[Tensor, Tensor, Tensor, Spans, float | None, int | None, float], Tensor]

PACKAGES = {"flash": FLASH_ATTN, "fused": TRANSFORMER_ENGINE}
# compute capabilities whose shared memory is too small for the backward pass of heads above 192
SMALL = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@dataclasses.dataclass(frozen=True)
class Choice:
    """``name``: of the backend. ``kernel``: its function. ``why_not``: by name, of those that ``auto`` passed over on
    CUDA."""

    name: str
    kernel: Kernel
    why_not: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def describe(self) -> str:
        """A line for the log."""
        passed = "; ".join(f"{name} {reason}" for name, reason in self.why_not.items())
        return f"attention: {self.name}" + (f" ({passed})" if passed else "")


def choose(backend: str, shape: AttentionShape) -> Choice:
    """The kernel of ``--attention-backend``.

    Args:
        backend: one of :data:`~mft_megatron.arguments.values.attention.BACKENDS`.
        shape: what is asked of it.

    Raises:
        InputError: it cannot compute this, or not here: why, and what to do.
    """
    if backend == "auto":
        why_not: dict[str, str] = {}
        for name in ("flash", "varlen") if devices.HAS_CUDA else ():
            reason = unavailable(name, shape)
            if reason is None:
                return Choice(name, KERNELS[name](), why_not)
            why_not[name] = reason
        return Choice("local", local, why_not)
    reason = unavailable(backend, shape)
    if reason is not None:
        raise InputError(f"--attention-backend {backend} {reason}")
    return Choice(backend, KERNELS[backend]())


def unavailable(backend: str, shape: AttentionShape) -> str | None:
    """Why a backend cannot compute this here, and what would help; ``None`` where it can."""
    reason = limit_of(backend, shape)
    if reason is not None or backend == "local":
        return reason
    if backend not in KERNELS:
        return f"is none of {', '.join(BACKENDS)}"
    if not devices.HAS_CUDA:
        return "needs a CUDA device, and there is none here; use local"
    capability = torch.cuda.get_device_capability(devices.device())
    least = (9, 0) if backend == "fused" else (8, 0)
    if capability < least:
        return f"needs compute capability {_dotted(least)}, and this GPU has {_dotted(capability)}; use local"
    if shape.head_size > 192 and capability in SMALL:
        return f"takes heads of up to 192 on compute capability {_dotted(capability)}, not {shape.head_size}; use local"
    if backend in PACKAGES:
        reason = missing(PACKAGES[backend])
        return None if reason is None else f"{reason}; or use varlen or local"
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError as error:
        return f"is not in this torch {torch.__version__} ({error}); install torch 2.13, or use local"
    return None


def shape_of(config: TransformerConfig, dropout: float) -> AttentionShape:
    """What the layers of this configuration ask."""
    return AttentionShape(
        BY_DTYPE[config.params_dtype].name,
        config.kv_channels,
        dropout,
        config.window_size[0] if config.window_size is not None and config.window_size[0] >= 0 else None,
        config.context_parallel_size > 1,
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """:func:`.sdpa.local` in bf16 or fp16 on CUDA, without dropout."""
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError(f"torch.nn.attention.varlen has no dropout, not {dropout}")
    query, key, value = map(_dense_heads, (query, key, value))
    return varlen_attn(
        query,
        key,
        value,
        spans.cu_q,
        spans.cu_k,
        spans.max_q,
        spans.max_k,
        scale=scale,
        window_size=_window(window),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """:func:`.sdpa.local` in bf16 or fp16 on CUDA."""
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
    )


class Fused:
    """:func:`.sdpa.local` in bf16 or fp16 on CUDA, without dropout where there is a window or pieces have fewer queries
    than keys.

    Transformer Engine's module, which knows sizes, scale and dropout when it is made: one for each that is asked for.
    They are no part of the model, so that nothing of theirs is in its checkpoints.
    """

    def __init__(self):
        self._made: dict[tuple, Any] = {}

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
        attention = self._module(query.shape[1], key.shape[1], query.shape[2], scale, dropout)
        # without gradients less is kept; but a layer that will be computed again has to drop the same both times
        attention.train(torch.is_grad_enabled() or dropout > 0)
        # where both masks are the same cuDNN can do more with the one aligned at the start
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

    def _module(self, heads: int, groups: int, size: int, scale: float | None, dropout: float) -> torch.nn.Module:
        wanted = (heads, groups, size, scale, dropout)
        if wanted not in self._made:
            from transformer_engine.pytorch import DotProductAttention

            # heads of this rank alone; the caller sees to the random numbers of dropout
            self._made[wanted] = DotProductAttention(
                heads, size, num_gqa_groups=groups, attention_dropout=dropout, qkv_format="thd", softmax_scale=scale
            )
        return self._made[wanted]


def _window(window: int | None) -> tuple[int, int]:
    """Tokens that are seen to the left and to the right besides oneself; -1: all."""
    return (-1 if window is None else window, 0)


def _dense_heads(tensor: Tensor) -> Tensor:
    """The kernels want the numbers of a head to lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# what makes the kernel of a layer
KERNELS: Mapping[str, Callable[[], Kernel]] = {
    "local": lambda: local,
    "varlen": lambda: varlen,
    "flash": lambda: flash,
    "fused": Fused,
}

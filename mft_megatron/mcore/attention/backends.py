"""The choice of the kernel that computes attention, with the reason why another one cannot.

::

    query, key, value, spans ─► local | varlen | flash | fused ─► [queries, heads, d]

=======  ======================================================================================================
local    PyTorch's scaled dot-product attention, slice by slice (:mod:`.attention.sdpa`): any device, any dtype
varlen   ``torch.nn.attention.varlen``: FlashAttention 2 as it is built into torch
flash    the package flash-attn: FlashAttention 2, with dropout
fused    cuDNN's attention through Transformer Engine
=======  ======================================================================================================

On Hopper and Blackwell ``auto`` takes varlen with FlashAttention 3 or 4 where its package works (:mod:`.newer_flash`).
Otherwise it takes flash where that package works, else varlen, else local. The first two are the same kernels; the
package comes first because it has dropout and is newer than what torch was built with, and because a user who built
flash-attn wants it used. auto never takes fused: Transformer Engine's choice depends on versions of cuDNN and on
environment variables, so the options of a run would not determine what computes it. Every kernel is compared with local
by ``tests/gpu``. On the CPU and in fp32 auto takes local.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
from collections.abc import Callable, Mapping

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mft_megatron.arguments.values.attention import BACKENDS, AttentionShape, limit_of
from mft_megatron.errors import InputError
from mft_megatron.mcore.parallel.attention_spans import Spans
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.optional_packages import FLASH_ATTN, TRANSFORMER_ENGINE, Package, missing
from mft_megatron.mcore.platform.precisions import BY_DTYPE

from . import newer_flash
from .cuda_kernels import Fused, flash, lacking_of_varlen, varlen
from .sdpa import local

# (query, key, value, spans, scale, window, dropout) -> like query; see :func:`.attention.sdpa.local`
Kernel = Callable[[Tensor, Tensor, Tensor, Spans, float | None, int | None, float], Tensor]

# compute capabilities whose shared memory is too small for the backward pass of heads above 192
SMALL = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@dataclasses.dataclass(frozen=True)
class Backend:
    """A kernel, and what it needs to run.

    Attributes:
        make: makes the kernel of a layer.
        capability: the least compute capability; ``None`` for a kernel of any device.
        lacking: says what this installation lacks for an attention, with the remedy; ``None`` where it has all.
    """

    make: Callable[[], Kernel]
    capability: tuple[int, int] | None = None
    lacking: Callable[[AttentionShape], str | None] = lambda shape: None


def _without(package: Package) -> Callable[[AttentionShape], str | None]:
    """Return the function that says why a package cannot be used."""

    def lacking(shape: AttentionShape) -> str | None:
        reason = missing(package)
        return None if reason is None else f"{reason}; or use varlen or local"

    return lacking


KERNELS: Mapping[str, Backend] = {
    "local": Backend(lambda: local),
    "varlen": Backend(lambda: varlen, (8, 0), lacking_of_varlen),
    "flash": Backend(lambda: flash, (8, 0), _without(FLASH_ATTN)),
    "fused": Backend(Fused, (9, 0), _without(TRANSFORMER_ENGINE)),
}


# names of kernels, and of generations of FlashAttention, from the one that auto takes first to the last
PREFERRED = (*(generation.name for generation in newer_flash.GENERATIONS), "flash", "varlen", "local")
# those of them that auto does not take in this run, with the reason
_left_out: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernel that computes attention.

    Attributes:
        name: of the backend.
        kernel: its function.
        why_not: by name, the reason why ``auto`` did not take a backend that it prefers; only on CUDA.
        generation: of FlashAttention, in torch's words, where it is not the one that is built into torch.
    """

    name: str
    kernel: Kernel
    why_not: Mapping[str, str] = dataclasses.field(default_factory=dict)
    generation: str | None = None

    @property
    def preferred_as(self) -> str:
        """Its name in :data:`PREFERRED`."""
        return self.generation or self.name

    def describe(self) -> str:
        """Describe the choice in a line for the log."""
        reasons = "; ".join(f"{name} {reason}" for name, reason in self.why_not.items())
        name = self.name if self.generation is None else f"{self.name} with {self.generation}"
        return f"attention: {name}" + (f" ({reasons})" if reasons else "")


def choose(backend: str, shape: AttentionShape) -> Choice:
    """Choose the kernel of ``--attention-backend``.

    Args:
        backend: one of :data:`~mft_megatron.arguments.values.attention.BACKENDS`.
        shape: what it has to compute.

    Raises:
        InputError: the backend cannot compute this, or not on this machine; with the reason and the remedy.
    """
    if backend == "auto":
        why_not: dict[str, str] = {}
        if devices.HAS_CUDA and unavailable("varlen", shape) is None:
            generation, reasons = newer_flash.activate(shape, frozenset(_left_out))
            why_not |= {name: reason for name, reason in _left_out.items() if name not in KERNELS}
            why_not |= reasons
            if generation is not None:
                return Choice("varlen", varlen, why_not, generation)
        for name in ("flash", "varlen") if devices.HAS_CUDA else ():
            reason = _left_out.get(name) or unavailable(name, shape)
            if reason is None:
                return Choice(name, KERNELS[name].make(), why_not)
            why_not[name] = reason
        return Choice("local", local, why_not)
    reason = unavailable(backend, shape)
    if reason is not None:
        raise InputError(f"--attention-backend {backend} {reason}")
    return Choice(backend, KERNELS[backend].make())


def leave_out(name: str, reason: str) -> None:
    """Let auto take no kernel of this name in :data:`PREFERRED` from now on, in the whole process."""
    _left_out[name] = reason


def unavailable(backend: str, shape: AttentionShape) -> str | None:
    """The reason why a backend cannot compute this here, with the remedy; ``None`` where it can."""
    reason = limit_of(backend, shape)
    if reason is not None:
        return reason
    if backend not in KERNELS:
        return f"is none of {', '.join(BACKENDS)}"
    least = KERNELS[backend].capability
    if least is not None:
        if not devices.HAS_CUDA:
            return "needs a CUDA device, and there is none here; use local"
        capability = devices.capability()
        if capability < least:
            return f"needs compute capability {_dotted(least)}, and this GPU has {_dotted(capability)}; use local"
        if shape.head_size > 192 and capability in SMALL:
            return (
                f"takes heads of up to 192 on compute capability {_dotted(capability)}, not {shape.head_size}; use "
                "local"
            )
    return KERNELS[backend].lacking(shape)


def shape_of(config: TransformerConfig, dropout: float) -> AttentionShape:
    """Describe the attention that the layers of a configuration compute, with this dropout."""
    return AttentionShape(
        BY_DTYPE[config.params_dtype].name,
        config.kv_channels,
        dropout,
        config.window_size[0] if config.window_size is not None and config.window_size[0] >= 0 else None,
        config.context_parallel_size > 1,
        config.num_query_groups != config.num_attention_heads,
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))

"""FlashAttention 3 and 4 in place of the FlashAttention 2 that is built into torch, on Hopper and Blackwell.

torch can put the kernels of an installed package behind ``torch.nn.attention.varlen``, for the whole process. Packages
and torch's code for them are young, so they are taken only after they have computed attention of this run's shape on
this GPU, forward and backward, with the numbers of plain fp32 on the CPU.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mft_megatron.arguments.values.attention import AttentionShape
from mft_megatron.errors import in_a_line
from mft_megatron.mcore.parallel.attention_spans import Spans
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.precisions import DTYPES

from .cuda_kernels import varlen
from .sdpa import local

# queries and keys of each segment slice of the sample; more keys than queries come with context parallelism
QUERIES, KEYS, MORE_KEYS = (5, 64, 1, 130), (5, 64, 1, 130), (5, 80, 40, 200)
# largest difference from fp32, by the largest number: an error of a kernel is of the numbers' own size
TOLERANCE = 0.03


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of FlashAttention that torch can take from a package.

    Attributes:
        name: torch's.
        module: the module that torch imports.
        majors: major compute capabilities on which torch's code takes it.
    """

    name: str
    module: str
    majors: tuple[int, ...]


GENERATIONS = (
    Generation("FA3", "flash_attn_interface", (9,)),
    Generation("FA4", "flash_attn.cute.interface", (9, 10)),
)


@functools.cache
def activate(shape: AttentionShape, without: frozenset[str] = frozenset()) -> tuple[str | None, Mapping[str, str]]:
    """Put the first generation that computes this attention right behind ``torch.nn.attention.varlen``.

    Args:
        shape: of the attention, which ``varlen`` can compute.
        without: names of generations that are not taken.

    Returns:
        the generation's name, or ``None`` if FlashAttention 2 stays; and by name, the reason why one was not taken.
    """
    reasons: dict[str, str] = {}
    if devices.device().type != "cuda":  # simulated
        return None, reasons
    _restore()
    for generation in GENERATIONS:
        if devices.capability()[0] not in generation.majors or generation.name in without:
            continue
        reason = _try(generation, shape, devices.device())
        if reason is None:
            return generation.name, reasons
        reasons[generation.name] = reason
    return None, reasons


def _try(generation: Generation, shape: AttentionShape, device: torch.device) -> str | None:
    """Activate a generation; returns why it cannot be used, after which FlashAttention 2 is active again."""
    attention = torch.nn.attention
    if not hasattr(attention, "activate_flash_attention_impl"):
        return f"cannot be activated in this torch {torch.__version__}"
    try:
        attention.activate_flash_attention_impl(generation.name)
        windows = {None, shape.window}
        if all(_is_right(shape, window, device) for window in windows):
            return None
        reason = "gave wrong numbers"
    except ModuleNotFoundError:
        reason = f"is not installed (no {generation.module})"
    except Exception as error:  # symbols of another torch, a compiler of its own, shapes that it lacks
        reason = f"cannot compute this ({in_a_line(error)})"
    _restore()
    return reason


def _restore() -> None:
    """Let FlashAttention 2 be active again; in a torch that knows no other it is."""
    with contextlib.suppress(Exception):
        if torch.nn.attention.current_flash_attention_impl() is not None:
            torch.nn.attention.restore_flash_attention_impl()


def _is_right(shape: AttentionShape, window: int | None, device: torch.device) -> bool:
    """Whether ``varlen`` now gives the output and the gradients that plain PyTorch gives in fp32 on the CPU."""
    lengths = np.array(QUERIES), np.array(MORE_KEYS if shape.context_parallel else KEYS)
    queries, keys = (int(each.sum()) for each in lengths)
    groups = 1 if shape.grouped_queries else 4
    generator = torch.Generator().manual_seed(0)  # the run's random numbers stay as they are
    sample = [
        torch.randn(tokens, heads, shape.head_size, generator=generator).to(DTYPES[shape.precision])
        for tokens, heads in ((queries, 4), (keys, groups), (keys, groups), (queries, 4))
    ]
    exact = _forward_and_backward(local, [tensor.float() for tensor in sample], Spans.of(*lengths), window)
    found = _forward_and_backward(varlen, [one.to(device) for one in sample], Spans.of(*lengths, device), window)
    return all(
        bool((one.float().cpu() - other).abs().max() <= TOLERANCE * other.abs().max())
        for one, other in zip(found, exact, strict=True)
    )


def _forward_and_backward(
    kernel: Callable[..., Tensor], sample: Sequence[Tensor], spans: Spans, window: int | None
) -> list[Tensor]:
    """Output of a kernel [queries, heads, d], and the gradients of query, key and value in their shapes."""
    *inputs, upstream = sample
    inputs = [tensor.requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        output = kernel(*inputs, spans, None, window)
        return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]

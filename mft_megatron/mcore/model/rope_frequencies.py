"""Frequencies of rotary positions: plain, or scaled for contexts longer than those of pretraining.

Computed here, from all numbers of the scaling: Megatron-Core's own Llama-3 scaling knows the factors 1 and 4 and the
length 8192 alone.
"""

import math

import torch
from torch import Tensor

from mft_megatron.arguments.values.rope_scaling import RopeScaling


def inverse_frequencies(size: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """What a position is multiplied by to get its angles.

    Args:
        size: how much of a head is rotated, even.
        base: ``--rotary-base``.

    Returns:
        fp32 [size / 2].
    """
    plain = 1.0 / (base ** (torch.arange(0, size, 2).float() / size))
    if scaling is None:
        return plain
    return _SCALINGS[scaling.rope_type](plain, size, base, scaling)


def _linear(plain: Tensor, size: int, base: float, scaling: RopeScaling) -> Tensor:
    return plain / scaling.factor


def _llama3(plain: Tensor, size: int, base: float, scaling: RopeScaling) -> Tensor:
    """Short waves stay, long ones are stretched, those between are a mixture of both."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # within the length of pretraining
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _yarn(plain: Tensor, size: int, base: float, scaling: RopeScaling) -> Tensor:
    """Like Llama 3's, with a ramp over the number of the frequency instead of its turns."""

    def place(turns: float) -> float:
        """Where the frequency is that turns so often within the length of pretraining."""
        length = scaling.original_max_position_embeddings
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    stretched = ((torch.arange(size // 2).float() - first) / ((last - first) or 0.001)).clamp(0, 1)
    return (1 - stretched) * plain + stretched * plain / scaling.factor


_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}


def softmax_scale(head: int, scaling: RopeScaling | None) -> float | None:
    """The scale of attention scores where a scaling changes it, for whole heads that are rotated; else ``None``.

    Cosines and sines of query and key times a factor are scores times its square.
    """
    factor = None if scaling is None else scaling.attention_factor
    return None if factor in (None, 1.0) else factor**2 / math.sqrt(head)

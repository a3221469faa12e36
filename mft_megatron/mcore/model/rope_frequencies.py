"""Frequencies of rotary positions: plain, or scaled for contexts longer than those of pretraining.

Megatron-Core's Llama-3 scaling supports only the factors 1 and 4 and the length 8192; here all values of a scaling are
used.
"""

import math

import torch
from torch import Tensor

from mft_megatron.arguments.values.rope_scaling import RopeScaling


def inverse_frequencies(size: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """Compute the inverse frequencies, by which a position is multiplied to get its angles.

    Args:
        size: elements of a head that are rotated, even.
        base: ``--rotary-base``.
        scaling: ``--rope-scaling`` options; ``None`` for plain frequencies.

    Returns:
        fp32 [size / 2].
    """
    plain = 1.0 / (base ** (torch.arange(0, size, 2).float() / size))
    if scaling is None:
        return plain
    return _SCALINGS[scaling.rope_type](plain, size, base, scaling)


def _needed(scaling: RopeScaling, field: str) -> float:
    """A value that this kind of scaling always has.

    Raises:
        ValueError: it is missing, in a scaling that the command line did not check.
    """
    value: float | None = getattr(scaling, field)
    if value is None:
        raise ValueError(f"{scaling.rope_type} needs {field}")
    return value


def _linear(plain: Tensor, size: int, base: float, scaling: RopeScaling) -> Tensor:
    return plain / scaling.factor


def _llama3(plain: Tensor, size: int, base: float, scaling: RopeScaling) -> Tensor:
    """Keep short wavelengths, stretch long ones, and interpolate between (``_compute_llama3_parameters``)."""
    turns = (
        _needed(scaling, "original_max_position_embeddings") * plain / (2 * math.pi)
    )  # within the pretraining length
    low, high = _needed(scaling, "low_freq_factor"), _needed(scaling, "high_freq_factor")
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _yarn(plain: Tensor, size: int, base: float, scaling: RopeScaling) -> Tensor:
    """Scale like Llama 3, with a ramp over the index of the frequency instead of its turns (arXiv 2309.00071)."""

    def index_of(turns: float) -> float:
        """Index of the frequency with so many turns within the pretraining length; not always whole."""
        length = _needed(scaling, "original_max_position_embeddings")
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = index_of(_needed(scaling, "beta_fast")), index_of(_needed(scaling, "beta_slow"))
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    stretched = ((torch.arange(size // 2).float() - first) / ((last - first) or 0.001)).clamp(0, 1)
    return (1 - stretched) * plain + stretched * plain / scaling.factor


_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}


def softmax_scale(head: int, scaling: RopeScaling | None) -> float | None:
    """Compute the scale of attention scores where a scaling changes it, for heads that are rotated as a whole.

    A factor on cosines and sines of query and key multiplies scores by its square.

    Args:
        head: elements of a head.
        scaling: ``--rope-scaling`` options.

    Returns:
        the scale; ``None`` for the usual one, 1 / √head.
    """
    factor = None if scaling is None else scaling.attention_factor
    return None if factor is None or factor == 1.0 else factor**2 / math.sqrt(head)

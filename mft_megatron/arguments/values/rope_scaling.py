"""Scaled rotary frequencies, the value of ``--rope-scaling``: a JSON object with the names of Hugging Face."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """One kind of scaling with all its numbers; :mod:`mft_megatron.mcore.model.rope_frequencies` computes with them.

    Attributes:
        rope_type: linear, llama3 or yarn; numbers that a kind does not use are ``None``.
        factor: longer context / original context.
        original_max_position_embeddings: tokens of the original context (llama3, yarn).
        low_freq_factor, high_freq_factor: bounds of the blend of frequencies (llama3).
        attention_factor: factor of cosines and sines (yarn).
        beta_fast, beta_slow: rotations in the original context at which frequencies are kept and interpolated (yarn).
        truncate: whether the bounds of the blend are rounded to whole dimensions (yarn).
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None

    def as_text(self) -> str:
        """Return the value of ``--rope-scaling``, the same text for equal scalings."""
        return json.dumps({name: value for name, value in dataclasses.asdict(self).items() if value is not None})


_LLAMA3 = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
_YARN = ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate")
# Entries of each kind besides rope_type and factor.
_ENTRIES: dict[str, tuple[str, ...]] = {"linear": (), "llama3": _LLAMA3, "yarn": (*_YARN, "mscale", "mscale_all_dim")}


def read_rope_scaling(entries: Mapping[str, Any]) -> RopeScaling:
    """Make a scaling from the entries of Hugging Face; missing entries of YaRN get their defaults.

    Raises:
        ValueError: a kind or entry is unknown, or an entry is missing or out of range.
    """
    kind = entries.get("rope_type")
    if not isinstance(kind, str) or kind not in _ENTRIES:
        raise ValueError(f"rope_type {kind!r}: give one of {', '.join(_ENTRIES)}")
    unknown = [name for name in entries if name not in ("rope_type", "factor", *_ENTRIES[kind])]
    if unknown:
        raise ValueError(f"{kind} has no {', '.join(unknown)}")
    given = {name: value for name, value in entries.items() if value is not None}
    if kind == "yarn":
        given = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, **given}
    for name in ("factor", *(_LLAMA3 if kind == "llama3" else _YARN[:1] if kind == "yarn" else ())):
        if name not in given:
            raise ValueError(f"{kind} needs {name}")
    for name, value in given.items():
        if name not in ("rope_type", "truncate") and not (_is_number(value) and value > 0):
            raise ValueError(f"{name} is {value!r}; it must be a number above 0")
    if not isinstance(given.get("truncate", True), bool):
        raise ValueError(f"truncate is {given['truncate']!r}; it must be true or false")
    if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        raise ValueError("low_freq_factor must be below high_freq_factor")
    if kind == "yarn":
        mscale, of_all = given.pop("mscale", None), given.pop("mscale_all_dim", None)
        given.setdefault("attention_factor", _attention_factor(given["factor"], mscale, of_all))
    values: dict[str, Any] = {
        name: value if name in ("rope_type", "truncate") else _count(name, value) if name == _YARN[0] else float(value)
        for name, value in given.items()
    }
    return RopeScaling(**values)


def rope_scaling(text: str) -> str:
    """Parse the value of ``--rope-scaling`` and return it complete and in its one spelling.

    Raises:
        ValueError: the text describes no scaling.
    """
    entries = json.loads(text)
    if not isinstance(entries, dict):
        raise ValueError("must be a JSON object")
    return read_rope_scaling(entries).as_text()


# The message of argparse that refuses a value contains the function's name.
rope_scaling.__name__ = 'JSON with "rope_type": linear, llama3 or yarn, and that kind\'s numbers'


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _count(name: str, value: float) -> int:
    if value != int(value):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    return int(value)


def _attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """The attention factor of YaRN for a model that gives none (Peng et al. 2023, arXiv 2309.00071)."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)

"""Scaled rotary frequencies, as ``--rope-scaling`` says them: a JSON object in Hugging Face's words, complete."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """One kind of scaling with all its numbers; ``mcore/rope_frequencies.py`` computes with them.

    ``rope_type``: ``linear`` (by ``factor``), ``llama3`` (``low_freq_factor``, ``high_freq_factor`` and
    ``original_max_position_embeddings`` besides) or ``yarn`` (the rest besides ``factor``). ``attention_factor``: what
    cosines and sines are multiplied by. What a kind has no use for is ``None``.
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
        """The value of ``--rope-scaling``: equal for equal scalings."""
        return json.dumps({name: value for name, value in dataclasses.asdict(self).items() if value is not None})


_LLAMA3 = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
_YARN = ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate")
# names that a kind may have besides rope_type and factor
_OWN: dict[str, tuple[str, ...]] = {"linear": (), "llama3": _LLAMA3, "yarn": (*_YARN, "mscale", "mscale_all_dim")}


def read_rope_scaling(entries: Mapping[str, Any]) -> RopeScaling:
    """A scaling from its entries in Hugging Face's words; what YaRN leaves out gets its defaults.

    Raises:
        ValueError: an unknown kind or entry, or one that is missing or out of range.
    """
    kind = entries.get("rope_type")
    if kind not in _OWN:
        raise ValueError(f"rope_type {kind!r}: give one of {', '.join(_OWN)}")
    unknown = [name for name in entries if name not in ("rope_type", "factor", *_OWN[kind])]
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
    numbers = {
        name: value if name in ("rope_type", "truncate") else _count(name, value) if name == _YARN[0] else float(value)
        for name, value in given.items()
    }
    return RopeScaling(**numbers)


def rope_scaling(text: str) -> str:
    """The value of ``--rope-scaling``, complete and in one spelling.

    Raises:
        ValueError: it is no scaling.
    """
    entries = json.loads(text)
    if not isinstance(entries, dict):
        raise ValueError("must be a JSON object")
    return read_rope_scaling(entries).as_text()


# argparse names the function where a value is refused
rope_scaling.__name__ = 'JSON with "rope_type": linear, llama3 or yarn, and that kind\'s numbers'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(name: str, value: float) -> int:
    if value != int(value):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    return int(value)


def _attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """YaRN's own, where the model names none."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)

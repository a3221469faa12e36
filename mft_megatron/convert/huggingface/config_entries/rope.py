"""Entries for rotary positions, as transformers 4 and 5 spell them."""

import dataclasses
from collections.abc import Mapping

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.arguments.values.rope_scaling import read_rope_scaling
from mft_megatron.errors import InputError

from .entry import Config, Fields

# theta and the text of --rope-scaling; theta is checked after the spellings have been compared
_Reading = tuple[object, str | None]
# entries of published scalings that no release of transformers reads
_UNREAD = ("finetuned",)
# transformers 5 prefers this entry beside a scaling to that of the scaling, transformers 4 does not read it
_ORIGINAL = "original_max_position_embeddings"


class Rope:
    """Rotary positions: ``rope_theta`` and ``rope_scaling`` in transformers 4, ``rope_parameters`` in 5.

    Each version ignores the other's entries silently, so both are written, and where both are present they must agree.
    """

    names: tuple[str, ...] = ("rope_theta", "rope_scaling", "rope_parameters", _ORIGINAL)

    def __init__(self, theta: float = 10000.0):
        self._theta = theta

    def read(self, config: Config) -> Fields:
        """Read base and scaling; raise ``InputError`` for disagreeing spellings or what cannot be expressed."""
        old, new = config.get("rope_scaling"), config.get("rope_parameters")
        base = config.get("rope_theta")
        readings = [self._read_spelling(entries, base, config) for entries in (old, new) if entries]
        if base is not None or not readings:
            base = self._theta if base is None else base
            if readings and any(theta != base for theta, _ in readings):
                raise InputError(f"rope_theta is {base}, that of the scaling is {readings[0][0]}; correct one of them")
            readings = readings or [(base, None)]
        if any(reading != readings[0] for reading in readings):
            raise InputError("rope_scaling and rope_parameters say different things; correct one of them")
        theta, scaling = readings[0]
        if not isinstance(theta, int | float) or isinstance(theta, bool) or theta < 2:
            raise InputError(f"rope_theta is {theta!r}; it must be a number from 2 on")
        return {"position_embedding_type": "rope", "rotary_base": float(theta), "rope_scaling": scaling}

    def _read_spelling(self, entries: object, base: object, config: Config) -> _Reading:
        """Base and scaling by one of the two spellings."""
        if not isinstance(entries, Mapping) or any(isinstance(value, Mapping) for value in entries.values()):
            raise InputError(f"rope_parameters {entries!r}: rotary positions that differ from layer to layer")
        present = {name: value for name, value in entries.items() if value is not None and name not in _UNREAD}
        kind = present.pop("type", "default")  # the older name of rope_type
        kind = present.pop("rope_type", kind)
        theta = present.pop("rope_theta", self._theta if base is None else base)
        if present.pop("partial_rotary_factor", 1.0) != 1.0:
            raise InputError("partial_rotary_factor: heads of this family are rotated as a whole")
        if "attn_factor" in present:
            raise InputError(
                "rotary scaling: transformers does not read attn_factor, and other programs do, so that they compute "
                "different models; remove it, or give attention_factor, the factor on cosines and sines, instead"
            )
        if kind == "default":
            if present:
                raise InputError(f"rope_parameters: unknown {', '.join(sorted(present))}")
            return theta, None
        if kind in ("yarn", "llama3"):
            present.setdefault(_ORIGINAL, config.get("max_position_embeddings"))
            if config.get(_ORIGINAL, present[_ORIGINAL]) != present[_ORIGINAL]:
                raise InputError(
                    f"{_ORIGINAL} is {config[_ORIGINAL]!r}, but the rotary scaling has {present[_ORIGINAL]!r}: "
                    "releases of transformers differ in which they read; give the right one in the scaling alone"
                )
        else:
            present.pop(_ORIGINAL, None)
        try:
            return theta, read_rope_scaling({"rope_type": kind, **present}).as_text()
        except ValueError as error:
            raise InputError(f"rotary scaling: {error}") from None

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write both spellings."""
        theta, parameters = float(architecture.rotary_base), _parameters(architecture)
        old = {} if architecture.scaling is None else {"rope_scaling": _scaling_entries(architecture)}
        return {"rope_theta": theta, **old, "rope_parameters": parameters}


class PartialRope(Rope):
    """Rotary positions of a part of each head; transformers 4 has separate names for it in GPT-NeoX."""

    names = (*Rope.names, "rotary_emb_base", "rotary_pct", "partial_rotary_factor")
    _PERCENT = 0.25

    def read(self, config: Config) -> Fields:
        """Read base, scaling and the rotated part of a head."""
        parameters = config.get("rope_parameters") or {}
        if not isinstance(parameters, Mapping):
            raise InputError(f"rope_parameters is {parameters!r}; it must be an object")
        scaling = config.get("rope_scaling") or {}
        spellings = [entries for entries in (parameters, scaling) if isinstance(entries, Mapping)]
        base = self._only(config, spellings, "rotary_emb_base", "rope_theta", self._theta)
        percent = self._only(config, spellings, "rotary_pct", "partial_rotary_factor", self._PERCENT)
        if not isinstance(percent, int | float) or not 0 < percent <= 1:
            raise InputError(f"rotary_pct is {percent!r}; it must be a number above 0, at most 1")
        entries = {name: value for name, value in parameters.items() if name != "partial_rotary_factor"}
        rope = super().read({**config, "rope_parameters": entries, "rope_theta": base})
        if percent < 1 and "yarn" in str(rope["rope_scaling"]):
            raise InputError("rotary scaling: yarn of a part of each head cannot be expressed")
        return {**rope, "rotary_percent": float(percent)}

    @staticmethod
    def _only(config: Config, spellings: list[Mapping[str, object]], old: str, name: str, default: float) -> object:
        """The value that transformers computes with; ``name`` outside the two spellings is not read, and must agree."""
        read = [
            value for value in (*(entries.get(name) for entries in spellings), config.get(old)) if value is not None
        ]
        if any(value != read[0] for value in read):
            raise InputError(f"{old} and the {name} of rope_parameters say different things; correct one of them")
        value, beside = read[0] if read else default, config.get(name)
        if beside is not None and beside != value:
            raise InputError(
                f"{name} is {beside!r}, which transformers does not read in this family: it computes with {value!r}; "
                f"give the right one as {old}, and remove {name}"
            )
        return value

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write both spellings, and GPT-NeoX's names."""
        percent = architecture.rotary_percent
        return {
            **super().write(architecture),
            "rope_parameters": {**_parameters(architecture), "partial_rotary_factor": percent},
            "rotary_emb_base": architecture.rotary_base,
            "rotary_pct": percent,
        }


def _scaling_entries(architecture: NetworkArguments) -> dict[str, object]:
    if architecture.scaling is None:
        return {"rope_type": "default"}
    return {name: value for name, value in dataclasses.asdict(architecture.scaling).items() if value is not None}


def _parameters(architecture: NetworkArguments) -> dict[str, object]:
    """The value of ``rope_parameters``."""
    return {**_scaling_entries(architecture), "rope_theta": float(architecture.rotary_base)}

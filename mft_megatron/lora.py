"""The description of low-rank adapters: the matrices that have one, rank and scale.

An adapted matrix W [out, in] computes ``W x + scale · B (A x)``, A [rank, in] and B [out, rank] (LoRA, Hu et al. 2021,
arXiv 2106.09685). Megatron-Core fuses matrices that Hugging Face stores separately; these are the *sources* of a
matrix:

::

    linear_qkv   0 query, 1 key, 2 value         linear_proj  0
    linear_fc1   0 gate, 1 up (or 0 alone)       linear_fc2   0

A target with Megatron's name has one A for all sources of the matrix, a target with Hugging Face's name has an A for
one source. B has the rows of W in either case. A source without an A is not adapted: its rows of B are 0 and stay 0.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mft_megatron.errors import InputError
from mft_megatron.parsing.typed_json import from_json

# Number of sources of each matrix, in models without a gate and with one.
SOURCES = {"linear_qkv": (3, 3), "linear_proj": (1, 1), "linear_fc1": (1, 2), "linear_fc2": (1, 1)}
# In a checkpoint the names of A and B are the name of their matrix with these suffixes.
LORA_A, LORA_B = ".lora_a", ".lora_b"
MLP = ("linear_fc1", "linear_fc2")
# Names of single sources in Hugging Face (Llama and similar models, GPT-NeoX, StarCoder2) and in Megatron-Bridge.
_SOURCE_NAMES = {
    ("linear_qkv", 0): ("q_proj", "linear_q"),
    ("linear_qkv", 1): ("k_proj", "linear_k"),
    ("linear_qkv", 2): ("v_proj", "linear_v"),
    ("linear_proj", 0): ("o_proj", "dense"),
    ("linear_fc1", 0): ("gate_proj", "linear_fc1_gate", "c_fc", "dense_h_to_4h"),
    ("linear_fc1", 1): ("up_proj", "linear_fc1_up"),
    ("linear_fc2", 0): ("down_proj", "c_proj", "dense_4h_to_h"),
}
_NAMES = {name: source for source, names in _SOURCE_NAMES.items() for name in names}
# GPT-NeoX stores queries, keys and values in one matrix, as Megatron does.
_WHOLE = {**{module: module for module in SOURCES}, "query_key_value": "linear_qkv"}
ONLY_GATED = ("gate_proj", "up_proj", "linear_fc1_gate", "linear_fc1_up")
ONLY_UNGATED = ("c_fc", "dense_h_to_4h")
ALL_LINEAR = "all-linear"
KNOWN_TARGETS = (*SOURCES, *_NAMES, "query_key_value", ALL_LINEAR)


def is_adapter(weight: str) -> bool:
    """Whether a weight of a checkpoint belongs to an adapter, by its name."""
    return weight.endswith((LORA_A, LORA_B))


@dataclasses.dataclass(frozen=True)
class Target:
    """An adapted matrix.

    Attributes:
        module: Megatron's name of the matrix, e.g. linear_qkv.
        sources: number of sources that are fused in the matrix.
        parts: for each A the indices of the sources that it belongs to.
    """

    module: str
    sources: int
    parts: tuple[tuple[int, ...], ...]

    @property
    def names(self) -> list[str]:
        """Names from which :func:`read_targets` makes this target."""
        whole = tuple(range(self.sources))
        return [self.module if part == whole else _SOURCE_NAMES[self.module, part[0]][0] for part in self.parts]


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model.

    Attributes:
        rank: rows of A and columns of B.
        alpha: numerator of :attr:`scale`.
        targets: the adapted matrices.
        dropout: dropout of the input of A, in training.
        rslora: whether :attr:`scale` divides by √rank.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...]
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """Factor of ``B A x``: alpha / rank, or alpha / √rank (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def target(self, module: str) -> Target | None:
        """The target with Megatron's name ``module``, or ``None`` if it is not adapted."""
        return next((target for target in self.targets if target.module == module), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can store them, for :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Lora":
        """Make the adapters that :meth:`as_dict` described.

        Raises:
            ValueError: ``content`` is no such description.
        """
        return from_json(Lora, content)

    def describe(self) -> str:
        """Return one line for the log."""
        kind = "rsLoRA" if self.rslora else "LoRA"
        names = [name for target in self.targets for name in target.names]
        return f"{kind} of rank {self.rank}, alpha {self.alpha:g}, on {', '.join(names)}"


def num_sources(module: str, gated: bool) -> int:
    """Number of Hugging Face matrices that are fused in Megatron's ``module``."""
    return SOURCES[module][gated]


def read_targets(names: Iterable[str], gated: bool) -> tuple[Target, ...]:
    """Return the targets of ``--lora-target-modules``, in the order of :data:`SOURCES`.

    Args:
        names: Megatron's names of matrices, Hugging Face's names of single sources, or ``all-linear``.
        gated: whether the model's MLPs have gates.

    Raises:
        InputError: a name is unknown, does not fit the model, or names a matrix that another one names.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    for name in _expanded(names, gated):
        if name not in _WHOLE and name not in _NAMES:
            raise InputError(
                f"{name!r} cannot have an adapter; known are {', '.join(KNOWN_TARGETS)} (embeddings, output layer, "
                "norms and experts cannot)"
            )
        if name in (ONLY_UNGATED if gated else ONLY_GATED):
            instead = "gate_proj and up_proj" if gated else "linear_fc1"
            raise InputError(f"{name}: the MLPs of this model are {'' if gated else 'not '}gated; name {instead}")
        module = _WHOLE.get(name) or _NAMES[name][0]
        part = tuple(range(num_sources(module, gated))) if name in _WHOLE else (_NAMES[name][1],)
        parts = found.setdefault(module, [])
        if any(source in other for other in parts for source in part):
            raise InputError(f"{name}: is named twice, also as a part of {module}; name it once")
        parts.append(part)
    return tuple(
        Target(module, num_sources(module, gated), tuple(sorted(found[module])))
        for module in SOURCES
        if module in found
    )


def _expanded(names: Iterable[str], gated: bool) -> Sequence[str]:
    """Replace ``all-linear``: it means, as in PEFT, every Hugging Face matrix separately."""
    listed: list[str] = []
    for name in names:
        listed += _each_source(gated) if name == ALL_LINEAR else [name]
    return listed


def _each_source(gated: bool) -> list[str]:
    ungated = {("linear_fc1", 0): "c_fc"} if not gated else {}
    return [
        ungated.get((module, source), _SOURCE_NAMES[module, source][0])
        for module in SOURCES
        for source in range(num_sources(module, gated))
    ]

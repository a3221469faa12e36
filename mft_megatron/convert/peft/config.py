"""``adapter_config.json``, PEFT's description of an adapter: written and read.

Entries that change what the model computes are read. Entries that only tell how an adapter was created or saved are
ignored. Any other must be off, since an unknown entry may change what the adapter computes.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from mft_megatron.errors import InputError
from mft_megatron.lora import Lora
from mft_megatron.parsing.json_files import read_json_object

from .adapted_weights import AdaptedMatrix

V = TypeVar("V")

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# entries that are ignored; the weights themselves show which matrices are adapted
IRRELEVANT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",  # concerns modules_to_save alone
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
# initialisations that leave the model unchanged; others (PiSSA, OLoRA, LoftQ …) change its weights
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# why common entries are refused
REASONS = {
    "modules_to_save": "whole matrices beside the adapters cannot be expressed",
    "use_dora": "DoRA cannot be expressed",
    "lora_bias": "biases in adapters cannot be expressed",
    "layers_to_transform": "an adapter must be on every layer",
    "layer_replication": "layers that occur several times cannot be expressed",
    "target_parameters": "adapters of experts cannot be expressed",
    "trainable_token_indices": "trained rows of the embedding cannot be expressed",
    "fan_in_fan_out": "transposed weights cannot be expressed",
}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The entries of ``adapter_config.json`` that change what the model computes.

    Attributes:
        rank: rank of a matrix that ``rank_pattern`` does not name.
        alpha: alpha of a matrix that ``alpha_pattern`` does not name.
        dropout: dropout of the input of A, in training.
        rslora: whether the scale is alpha / √rank.
        base: name of the base model, for people; may be empty.
        rank_pattern: ranks by regular expression of the module's name.
        alpha_pattern: alphas by regular expression of the module's name.
    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    base: str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Rank of a matrix, by the full name of its module."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of a matrix, by the full name of its module."""
        return _by_pattern(self.alpha_pattern, module, self.alpha)


def _by_pattern(patterns: Mapping[str, V], module: str, default: V) -> V:
    """Value of the first regular expression that matches the end of the name (PEFT's rule)."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def config_of(lora: Lora, matrices: Iterable[AdaptedMatrix], base_model_name: str | None) -> dict[str, object]:
    """Write the content of ``adapter_config.json``.

    A matrix whose A is concatenated of several has the sum of their ranks, and the alpha that keeps the scale.

    Args:
        lora: the adapters of a checkpoint.
        matrices: the Hugging Face matrices that have one.
        base_model_name: name of the base model.
    """
    num_parts = {matrix.leaf: len(matrix.parts) for matrix in matrices}
    usual = min(num_parts.values())
    unusual = {leaf: count for leaf, count in num_parts.items() if count != usual}
    return {
        "alpha_pattern": {leaf: _alpha(lora, count) for leaf, count in unusual.items()},
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _alpha(lora, usual),
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": usual * lora.rank,
        "rank_pattern": {leaf: count * lora.rank for leaf, count in unusual.items()},
        "revision": None,
        "target_modules": sorted(num_parts),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }


def _alpha(lora: Lora, count: int) -> float | int:
    """Alpha of a matrix of ``count`` times the rank; an integer where it is whole, as others than PEFT expect."""
    alpha = lora.alpha * (math.sqrt(count) if lora.rslora else count)
    return int(alpha) if alpha == int(alpha) else alpha


def read_config(folder: Path) -> PeftConfig:
    """Read ``adapter_config.json`` of a folder.

    Raises:
        InputError: there is none, or an entry cannot be expressed here; the message names it.
    """
    file = folder / CONFIG
    if not file.is_file():
        problem = f"has no {CONFIG}" if folder.is_dir() else "is no folder"
        raise InputError(f"{folder}: {problem}; give the folder of a PEFT adapter")
    content = read_json_object(file, "write the adapter again")
    try:
        _refuse_inexpressible(content)
        return _read(content)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _refuse_inexpressible(content: Mapping[str, object]) -> None:
    if content.get("peft_type") != "LORA":
        raise InputError(f"peft_type is {content.get('peft_type')!r}; only LORA can be expressed")
    if content.get("bias", "none") != "none":
        raise InputError(f"bias is {content['bias']!r}: trained biases cannot be expressed; only 'none'")
    if (initialisation := content.get("init_lora_weights", True)) not in PLAIN_INITIALISATIONS:
        raise InputError(
            f"init_lora_weights is {initialisation!r}, which changes the model beside the adapter; convert it with "
            "PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    others = content.keys() - READ - IRRELEVANT - {"bias", "init_lora_weights"}
    for name in sorted(others, key=lambda name: (name not in REASONS, name)):
        if content[name]:  # None, False, 0 and empty values switch an entry off
            reason = REASONS.get(name, "not understood, and it may change what the adapter computes")
            raise InputError(f"{name} is {json.dumps(content[name])[:60]}: {reason}")


def _read(content: Mapping[str, object]) -> PeftConfig:
    return PeftConfig(
        rank=_rank("r", content.get("r", 8)),
        alpha=_number("lora_alpha", content.get("lora_alpha", 8)),
        dropout=_dropout("lora_dropout", content.get("lora_dropout", 0.0)),
        rslora=_flag("use_rslora", content.get("use_rslora", False)),
        base=str(content.get("base_model_name_or_path") or ""),
        rank_pattern=_pattern("rank_pattern", content.get("rank_pattern"), _rank),
        alpha_pattern=_pattern("alpha_pattern", content.get("alpha_pattern"), _number),
    )


def _rank(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {json.dumps(value)}; it must be a whole number from 1")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"{name} is {json.dumps(value)}; it must be a number")
    return float(value)


def _dropout(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{name} is {json.dumps(value)}; it must be a number from 0 below 1")
    return float(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} is {json.dumps(value)}; it must be true or false")
    return value


def _pattern(name: str, content: object, read: Callable[[str, object], V]) -> dict[str, V]:
    """Read an object from regular expressions to values; ``read`` is given the entry's name and its value."""
    entries = content or {}
    if not isinstance(entries, dict):
        raise InputError(f"{name} is {json.dumps(content)[:60]}; it must be an object")
    values = {}
    for key, value in entries.items():
        try:
            re.compile(key)
        except re.error as error:
            raise InputError(f"{name}: {key!r} is no regular expression ({error})") from None
        values[key] = read(f"{name} of {key}", value)
    return values

"""``adapter_config.json``: how PEFT describes an adapter, written and read.

What is read is what changes the function of the model. Entries that only say how an adapter was made or saved are
passed over; any other must be off, since an entry that this program does not know may change what the adapter computes.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mft_megatron.convert.huggingface.model_folder import read_object
from mft_megatron.errors import InputError
from mft_megatron.lora import Lora

from .adapter_rows import Matrix

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# the weights themselves say which matrices are adapted
IRRELEVANT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",  # of what modules_to_save names
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
# ways to begin that leave the model as it is; others (PiSSA, OLoRA, LoftQ …) take something out of its weights
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
# what is said of the entries that people will meet
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
    """What ``adapter_config.json`` says about the function. ``base``: the model's name there, for people."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    base: str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Of one matrix, by its full name."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Of one matrix, by its full name."""
        return _by_pattern(self.alpha_pattern, module, self.alpha)


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """PEFT's rule: the first entry that is the end of the name, as a regular expression."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def config_of(lora: Lora, matrices: Iterable[Matrix], base_model_name: str | None) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    A matrix that several A's of ours serve has their ranks together, and an alpha with which the scale stays.
    """
    several = {matrix.leaf: len(matrix.parts) for matrix in matrices}
    usual = min(several.values())
    ranks = {leaf: count * lora.rank for leaf, count in several.items()}
    alphas = {leaf: _alpha(lora, count) for leaf, count in several.items()}
    return {
        "alpha_pattern": {leaf: alpha for leaf, alpha in alphas.items() if several[leaf] != usual},
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
        "rank_pattern": {leaf: rank for leaf, rank in ranks.items() if several[leaf] != usual},
        "revision": None,
        "target_modules": sorted(several),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }


def _alpha(lora: Lora, count: int) -> float | int:
    """Of a matrix of ``count`` times the rank; a whole number as one, as readers other than PEFT expect it."""
    alpha = lora.alpha * (math.sqrt(count) if lora.rslora else count)
    return int(alpha) if alpha == int(alpha) else alpha


def read_config(folder: Path) -> PeftConfig:
    """What the adapter in a folder is.

    Raises:
        InputError: there is none, or it cannot be expressed here; in a line that names the entry.
    """
    file = folder / CONFIG
    if not file.is_file():
        what = "has no adapter_config.json" if folder.is_dir() else "is no folder"
        raise InputError(f"{folder}: {what}; give the folder of a PEFT adapter")
    content = read_object(file, "write the adapter again")
    try:
        _refuse_what_differs(content)
        return _read(content)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _refuse_what_differs(content: Mapping[str, Any]) -> None:
    if content.get("peft_type") != "LORA":
        raise InputError(f"peft_type is {content.get('peft_type')!r}; only LORA can be expressed")
    if content.get("bias", "none") != "none":
        raise InputError(f"bias is {content['bias']!r}: trained biases cannot be expressed; only 'none'")
    if (beginning := content.get("init_lora_weights", True)) not in PLAIN_BEGINNINGS:
        raise InputError(
            f"init_lora_weights is {beginning!r}, which changes the model beside the adapter; convert it with PEFT's "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    others = content.keys() - READ - IRRELEVANT - {"bias", "init_lora_weights"}
    for name in sorted(others, key=lambda name: (name not in REASONS, name)):
        if content[name]:  # neither None, False, 0 nor empty
            reason = REASONS.get(name, "not understood, and it may change what the adapter computes")
            raise InputError(f"{name} is {json.dumps(content[name])[:60]}: {reason}")


def _read(content: Mapping[str, Any]) -> PeftConfig:
    return PeftConfig(
        rank=_number("r", content.get("r", 8), int, 1),
        alpha=_number("lora_alpha", content.get("lora_alpha", 8), float),
        dropout=_number("lora_dropout", content.get("lora_dropout", 0.0), float, 0, below=1),
        rslora=_flag("use_rslora", content.get("use_rslora", False)),
        base=str(content.get("base_model_name_or_path") or ""),
        rank_pattern=_pattern("rank_pattern", content.get("rank_pattern"), int, 1),
        alpha_pattern=_pattern("alpha_pattern", content.get("alpha_pattern"), float),
    )


def _number(name: str, value: Any, kind: type, at_least: float = -math.inf, below: float = math.inf) -> Any:
    allowed = int if kind is int else int | float
    if isinstance(value, bool) or not isinstance(value, allowed) or not at_least <= value < below:
        whole = "a whole number" if kind is int else "a number"
        bounds = (f" from {at_least}" if at_least > -math.inf else "") + (f" below {below}" if below < math.inf else "")
        raise InputError(f"{name} is {json.dumps(value)}; it must be {whole}{bounds}")
    return kind(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} is {json.dumps(value)}; it must be true or false")
    return value


def _pattern(name: str, content: Any, kind: type, at_least: float = -math.inf) -> dict[str, Any]:
    if not isinstance(content or {}, dict):
        raise InputError(f"{name} is {json.dumps(content)[:60]}; it must be an object")
    found = {}
    for key, value in (content or {}).items():
        try:
            re.compile(key)
        except re.error as error:
            raise InputError(f"{name}: {key!r} is no regular expression ({error})") from None
        found[key] = _number(f"{name} of {key}", value, kind, at_least)
    return found

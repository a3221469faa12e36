"""Entries of ``config.json`` that no family reads, judged by transformers' own configuration class of a ``model_type``.

An entry that the class does not know cannot change what transformers computes, nor can one at the class's default.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .entry import Config
from .window import FULL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Entries that transformers' shared code reads of any configuration, whether its class knows them or not, with the value
# that changes nothing: masks and caches, rotary positions, and where weights are read from.
READ_OF_ANY_CLASS: Mapping[str, object] = {
    "_rope_type_labels": None,
    "is_causal": True,
    "attention_chunk_size": None,
    "compression_config": None,
    "fusion_config": None,
    "head_dim": None,
    "kv_sharing_modes": None,
    "layer_types": None,
    "num_kv_shared_layers": None,
    "per_layer_config": None,
    "sliding_window": None,
    "transformers_weights": None,
}


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Names of entries, sorted.

    Attributes:
        unread: the configuration class does not know them.
        refused: they may change what is computed.
    """

    unread: list[str]
    refused: list[str]


def judge(model_type: str, entries: Config) -> Judgement:
    """Judge entries that are not null; transformers is imported only if there are any.

    Args:
        model_type: one that transformers knows.
        entries: the entries by name.
    """
    unread, refused = [], []
    for name, value in sorted(entries.items()):
        if name in READ_OF_ANY_CLASS:
            if not _changes_nothing(name, value):
                refused.append(name)
        elif value is None:
            continue
        elif not _is_known(model_type, name):
            unread.append(name)
        elif not _is_default(model_type, name, value):
            refused.append(name)
    return Judgement(unread, refused)


def class_name(model_type: str) -> str:
    """Name of transformers' configuration class of a ``model_type``."""
    return _config_class(model_type).__name__


def known_names(model_type: str) -> set[str]:
    """Names of the fields of the configuration class, and the other names that it gives to some of them."""
    config_class = _config_class(model_type)
    return {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)


def _config_class(model_type: str) -> "type[PreTrainedConfig]":
    # importing transformers takes a second
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def _is_known(model_type: str, name: str) -> bool:
    # an entry can also replace an attribute of the class that is no field
    return name in known_names(model_type) or hasattr(_config_class(model_type), name)


def _is_default(model_type: str, name: str, value: object) -> bool:
    for field in dataclasses.fields(_config_class(model_type)):
        if field.name == name:
            made = field.default_factory() if callable(field.default_factory) else field.default
            return value == made and isinstance(value, bool) == isinstance(made, bool)
    return False


def _changes_nothing(name: str, value: object) -> bool:
    if name == "layer_types" and isinstance(value, list):
        return bool(value) and all(kind == FULL for kind in value)
    return value is READ_OF_ANY_CLASS[name]

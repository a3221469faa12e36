"""A model family: a table of weights and a table of configuration entries, each used in both directions."""

import dataclasses
from collections.abc import Callable
from typing import Any

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.errors import InputError

from .config_entries.entry import Config, Entry
from .config_entries.window import windowed_layers
from .mapped_weight import MappedWeight


@dataclasses.dataclass(frozen=True)
class Family:
    """The tables of one model family.

    Attributes:
        name: name in messages.
        model_type: ``model_type`` of ``config.json``.
        architecture: entry of ``architectures`` in ``config.json``: the model's class in transformers.
        weights: function from an architecture to every weight of such a model.
        entries: the entries of ``config.json`` that change what the model computes; any other is judged by
            ``config_entries/transformers_class.py`` unless ``config_entries/ignored.py`` lists it.
    """

    name: str
    model_type: str
    architecture: str
    weights: Callable[[NetworkArguments], tuple[MappedWeight, ...]]
    entries: tuple[Entry, ...]

    def read_config(self, config: Config) -> NetworkArguments:
        """Read the architecture that ``config.json`` describes.

        Raises:
            InputError: an entry is missing, damaged, or cannot be expressed.
        """
        # fields differ in type
        fields: dict[str, Any] = {}
        for entry in self.entries:
            fields.update(entry.read(config))
        return NetworkArguments(**fields)

    def write_config(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the entries of ``config.json`` that describe ``architecture``, as far as this family can."""
        config: dict[str, object] = {"architectures": [self.architecture], "model_type": self.model_type}
        for entry in self.entries:
            config.update(entry.write(architecture))
        return config

    def refuses(self, architecture: NetworkArguments) -> str | None:
        """Why this family cannot express an architecture, or ``None`` if it can.

        A family can express what it reads back unchanged from the configuration that it writes.
        """
        try:
            expressed = self.read_config(self.write_config(architecture))
        except InputError as error:
            return str(error)
        difference = first_difference(architecture, expressed)
        if difference is None:
            return None
        name, wanted, expressed_value = difference
        return f"{name} is {wanted}, {self.name} has {expressed_value}"

    def entry_names(self) -> set[str]:
        """Names of the entries of ``config.json`` that this family understands."""
        return {name for entry in self.entries for name in entry.names}


def comparable(architecture: NetworkArguments) -> dict[str, object]:
    """Everything in an architecture that changes what a model computes: equal for models that compute the same."""
    content = dataclasses.asdict(architecture)
    for name in ("make_vocab_size_divisible_by", "group_query_attention", "max_position_embeddings"):
        del content[name]
    if architecture.num_experts is None:
        content = {name: value for name, value in content.items() if not name.startswith("moe_")}
    elif architecture.moe_ffn_hidden_size is None:
        content["moe_ffn_hidden_size"] = architecture.ffn_hidden_size
    for name in ("add_bias_linear", "add_attention_bias", "add_qkv_bias", "add_mlp_bias"):
        del content[name]
    content |= {name: getattr(architecture, name) for name in ("qkv_bias", "attention_bias", "mlp_bias")}
    content["window_attn_skip_freq"] = windowed_layers(architecture)
    content["window_size"] = architecture.window
    if architecture.swiglu:
        del content["openai_gelu"]
    return content


def first_difference(architecture: NetworkArguments, other: NetworkArguments) -> tuple[str, object, object] | None:
    """Find the first entry in which two architectures compute differently: its name and both values."""
    entries, others = comparable(architecture), comparable(other)
    return next(((name, value, others.get(name)) for name, value in entries.items() if others.get(name) != value), None)

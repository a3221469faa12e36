"""Entries of ``config.json``, each read and written: what it is here, and what there.

An entry's ``theirs`` are the names that it understands. ``read`` takes the configuration and what earlier entries have
found; ``write`` is its inverse. What a published ``config.json`` leaves out has the default of its family's
configuration in transformers, so entries carry those.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.arguments.values.layer_pattern import layer_frequency, numbers_of
from mft_megatron.arguments.values.rope_scaling import read_rope_scaling
from mft_megatron.errors import InputError

Config = Mapping[str, Any]
REQUIRED = object()

# What says nothing about the function of the model: names, versions, how to train or to generate. Dropout and the
# losses that balance experts are options of a run.
IRRELEVANT = frozenset(
    """
    architectures model_type _name_or_path name_or_path transformers_version torch_dtype dtype use_cache
    initializer_range attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob
    residual_dropout embedding_dropout classifier_dropout bos_token_id eos_token_id pad_token_id sep_token_id
    unk_token_id decoder_start_token_id tokenizer_class pretraining_tp torchscript use_bfloat16 tf_legacy_loss
    return_dict return_dict_in_generate output_attentions output_hidden_states output_scores output_router_logits
    router_aux_loss_coef router_jitter_noise gradient_checkpointing _attn_implementation
    _attn_implementation_autoset attn_implementation _flash_attn_2_enabled keys_to_ignore_at_inference id2label
    label2id num_labels problem_type finetuning_task task_specific_params prefix is_decoder bad_words_ids
    begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty
    remove_invalid_values max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    num_return_sequences diversity_penalty length_penalty repetition_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size temperature top_k top_p typical_p unsloth_version unsloth_fixed
    """.split()
)
# What old configurations say to be off.
OFF = frozenset(
    "is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder chunk_size_feed_forward "
    "pruned_heads".split()
)


class Entry(Protocol):
    theirs: tuple[str, ...]

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of ``NetworkArguments``."""

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        """Entries of ``config.json``."""


class Fixed:
    """A field that the whole family has alike, without a word in ``config.json``."""

    theirs = ()

    def __init__(self, **fields: Any):
        self._fields = fields

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        return self._fields

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        return {}


class Only:
    """An entry that must say one thing, in one of several words, the first of which is written."""

    def __init__(self, name: str, *values: Any, absent: Any = REQUIRED):
        """``absent``: what it means where the entry is missing; by default the first of ``values``."""
        self.theirs = (name,)
        self._values = values
        self._absent = values[0] if absent is REQUIRED else absent

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        value = config.get(self.theirs[0], self._absent)
        # 0 is not False, nor 1 True
        if not any(value == allowed and type(value) is type(allowed) for allowed in self._values):
            raise InputError(
                f"{self.theirs[0]} is {value!r}, which this program cannot express; only {self._values[0]!r}"
            )
        return {}

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        return {self.theirs[0]: self._values[0]}


class Number:
    """A number under another name."""

    def __init__(self, ours: str, theirs: str, default: Any = REQUIRED, kind: type = int):
        self.theirs = (theirs,)
        self._ours, self._default, self._kind = ours, default, kind

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        return {self._ours: number(config, self.theirs[0], self._default, self._kind)}

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        return {self.theirs[0]: getattr(architecture, self._ours)}


class Flag:
    """Something that is on or off."""

    def __init__(self, ours: str, theirs: str, default: bool):
        self.theirs = (theirs,)
        self._ours, self._default = ours, default

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        return {self._ours: flag(config, self.theirs[0], self._default)}

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        return {self.theirs[0]: getattr(architecture, self._ours)}


class Vocabulary:
    """The number of tokens, which is no part of an architecture here; the conversion reads and writes it."""

    theirs = ("vocab_size",)

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        return {}


class Heads:
    """Query heads, key/value heads, and the size of a head where the configuration can name it."""

    def __init__(self, groups: int | None = None, head: int | None = None, has_groups: bool = True):
        """
        Args:
            groups: key/value heads where the entry is missing; as many as there are query heads where ``None``.
            head: likewise the size of a head; hidden size / heads where ``None``.
            has_groups: or there is no such entry.
        """
        self.theirs = ("num_attention_heads", *(("num_key_value_heads", "head_dim") if has_groups else ()))
        self._groups, self._head, self._has_groups = groups, head, has_groups

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        hidden, heads = found["hidden_size"], number(config, "num_attention_heads", REQUIRED, int)
        groups, head = heads, None
        if self._has_groups:
            groups = number(config, "num_key_value_heads", self._groups or heads, int, none_is_default=heads)
            head = number(config, "head_dim", self._head, int, none_is_default=None)
        if head is None and hidden % heads:
            raise InputError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        if heads % groups:
            raise InputError(f"num_attention_heads {heads} is not divisible by num_key_value_heads {groups}")
        return {
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "group_query_attention": groups != heads,
            "kv_channels": hidden // heads if head is None else head,
        }

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        found = {"num_attention_heads": architecture.num_attention_heads}
        if self._has_groups:
            found |= {"num_key_value_heads": architecture.num_query_groups, "head_dim": architecture.kv_channels}
        return found


class Rope:
    """Rotary positions as transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``) spell them.

    Each version reads its own and passes the other over without a word, so both are written, and where both are there
    they must agree.
    """

    theirs = ("rope_theta", "rope_scaling", "rope_parameters")

    def __init__(self, theta: float = 10000.0):
        self._theta = theta

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        old, new = config.get("rope_scaling"), config.get("rope_parameters")
        base = config.get("rope_theta")
        readings = [self._reading(entries, base, config) for entries in (old, new) if entries]
        if base is not None or not readings:
            base = self._theta if base is None else base
            if readings and any(theta != base for theta, _ in readings):
                raise InputError(f"rope_theta is {base}, the scaling's own says {readings[0][0]}; correct one of them")
            readings = readings or [(base, None)]
        if any(reading != readings[0] for reading in readings):
            raise InputError("rope_scaling and rope_parameters say different things; correct one of them")
        theta, scaling = readings[0]
        if not isinstance(theta, int | float) or isinstance(theta, bool) or theta < 2:
            raise InputError(f"rope_theta is {theta!r}; it must be a number from 2 on")
        return {"position_embedding_type": "rope", "rotary_base": float(theta), "rope_scaling": scaling}

    def _reading(self, entries: Any, base: float | None, config: Config) -> tuple[float, str | None]:
        """Base and scaling of one spelling."""
        if not isinstance(entries, Mapping) or any(isinstance(value, Mapping) for value in entries.values()):
            raise InputError(f"rope_parameters {entries!r}: rotary positions that differ from layer to layer")
        given = {name: value for name, value in entries.items() if value is not None}
        kind = given.pop("type", "default")  # the name before rope_type
        kind = given.pop("rope_type", kind)
        theta = given.pop("rope_theta", self._theta if base is None else base)
        if given.pop("partial_rotary_factor", 1.0) != 1.0:
            raise InputError("partial_rotary_factor: heads of this family are rotated as a whole")
        if kind == "default":
            if given:
                raise InputError(f"rope_parameters: unknown {', '.join(sorted(given))}")
            return theta, None
        if kind in ("yarn", "llama3"):
            given.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
        else:
            given.pop("original_max_position_embeddings", None)
        try:
            return theta, read_rope_scaling({"rope_type": kind, **given}).as_text()
        except ValueError as error:
            raise InputError(f"rotary scaling: {error}") from None

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        theta, scaling = float(architecture.rotary_base), architecture.scaling
        if scaling is None:
            return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        entries = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
        return {"rope_theta": theta, "rope_scaling": entries, "rope_parameters": {**entries, "rope_theta": theta}}


class PartialRope(Rope):
    """Rotary positions of a part of each head; GPT-NeoX has names of its own for it in transformers 4."""

    theirs = (*Rope.theirs, "rotary_emb_base", "rotary_pct", "partial_rotary_factor")
    _SHARE = 0.25

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        entries = dict(config.get("rope_parameters") or {})
        said = (
            entries.pop("partial_rotary_factor", None),
            config.get("rotary_pct"),
            config.get("partial_rotary_factor"),
        )
        shares = {share for share in said if share is not None} or {self._SHARE}
        bases = {base for base in (config.get("rope_theta"), config.get("rotary_emb_base")) if base is not None}
        if len(shares) > 1 or len(bases) > 1:
            raise InputError(
                "rotary_pct, rotary_emb_base and rope_parameters say different things; correct one of them"
            )
        whole = {**config, "rope_parameters": entries, "rope_theta": bases.pop() if bases else None}
        rope, share = super().read(whole, found), shares.pop()
        if share < 1 and rope["rope_scaling"] and "yarn" in rope["rope_scaling"]:
            raise InputError("rotary scaling: yarn of a part of each head cannot be expressed")
        return {**rope, "rotary_percent": float(share)}

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        rope, share = super().write(architecture), architecture.rotary_percent
        rope["rope_parameters"]["partial_rotary_factor"] = share
        return {**rope, "rotary_emb_base": architecture.rotary_base, "rotary_pct": share}


class Activation:
    """GELU, exact or by its tanh approximation."""

    _NAMES = ("gelu", "gelu_new", "gelu_pytorch_tanh")

    def __init__(self, name: str):
        self.theirs = (name,)

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        value = config.get(self.theirs[0], "gelu")
        if value not in self._NAMES:
            raise InputError(f"{self.theirs[0]} is {value!r}; only {', '.join(self._NAMES)} can be expressed")
        return {"openai_gelu": value != "gelu"}

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        return {self.theirs[0]: "gelu_pytorch_tanh" if architecture.openai_gelu else "gelu"}


class TanhGelu:
    """Gemma's activation function, GELU by its tanh approximation, which published configurations also call "gelu".

    transformers 4 goes by ``hidden_activation``, by its word, and takes the approximation where that is missing or
    null; transformers 5 goes by ``hidden_act`` and takes "gelu" for the approximation. What both take for it is read.
    """

    _NAMES = ("gelu_pytorch_tanh", "gelu_new")

    def __init__(self, name: str, name_in_4: str):
        self.theirs = (name, name_in_4)

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        for name, allowed in zip(self.theirs, ((*self._NAMES, "gelu"), (*self._NAMES, None)), strict=True):
            value = config.get(name, self._NAMES[0])
            if value not in allowed:
                raise InputError(
                    f"{name} is {value!r}, which this program cannot express in this family; only {self._NAMES[0]!r}"
                )
        return {"openai_gelu": True}

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        return dict.fromkeys(self.theirs, self._NAMES[0])


class Window:
    """A sliding window on every layer: ``sliding_window`` tokens, oneself among them."""

    theirs = ("sliding_window",)

    def __init__(self, default: int | None):
        self._default = default

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        tokens = number(config, "sliding_window", self._default, int, none_is_default=None)
        return {"window_size": None if tokens is None else f"{tokens - 1},0"}

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        return {"sliding_window": None if architecture.window is None else architecture.window + 1}


class WindowOfSomeLayers:
    """A sliding window from some layer on (``max_window_layers``), or on the layers that ``layer_types`` says."""

    theirs = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    _NAMES = ("full_attention", "sliding_attention")

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        layers, types = found["num_layers"], config.get("layer_types")
        in_use = flag(config, "use_sliding_window", False)
        tokens = number(config, "sliding_window", 4096, int, none_is_default=None) if in_use else None
        if types is not None and (len(types) != layers or set(types) - set(self._NAMES)):
            raise InputError(f"layer_types must say full_attention or sliding_attention for each of {layers} layers")
        first = number(config, "max_window_layers", 28, int, at_least=0)
        windowed = [tokens is not None and layer >= first for layer in range(layers)]
        if types is not None:
            windowed = [name == self._NAMES[1] for name in types]
        if not any(windowed):
            return {"window_size": None}
        if tokens is None:
            raise InputError("layer_types has sliding_attention, but use_sliding_window or sliding_window is off")
        frequency = None if all(windowed) else layer_frequency(str([int(layer) for layer in windowed]))
        return {"window_size": f"{tokens - 1},0", "window_attn_skip_freq": frequency}

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        if architecture.window is None:
            return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": architecture.num_layers}
        layers, windowed = architecture.num_layers, windowed_layers(architecture)
        first = windowed.index(True) if True in windowed else layers
        return {
            "use_sliding_window": True,
            "sliding_window": architecture.window + 1,
            "max_window_layers": first,
            "layer_types": [self._NAMES[layer] for layer in windowed],
        }


def windowed_layers(architecture: NetworkArguments) -> list[bool]:
    """Of each layer, whether it has a window."""
    frequency = numbers_of(architecture.window_attn_skip_freq)
    if architecture.window is None or frequency is None:
        return [architecture.window is not None] * architecture.num_layers
    if isinstance(frequency, int):
        return [(layer + 1) % frequency != 0 for layer in range(architecture.num_layers)]
    return [bool(layer) for layer in frequency]


class Biases:
    """Biases in all linear layers or in none, said by several entries at once."""

    def __init__(self, *theirs: str, default: bool = False):
        self.theirs = theirs
        self._default = default

    def read(self, config: Config, found: Mapping[str, Any]) -> dict[str, Any]:
        values = {name: flag(config, name, self._default) for name in self.theirs}
        if len(set(values.values())) > 1:
            said = " and ".join(f"{name} {str(value).lower()}" for name, value in values.items())
            raise InputError(f"{said}: biases in some linear layers and not in others cannot be expressed")
        return {"add_bias_linear": values[self.theirs[0]]}

    def write(self, architecture: NetworkArguments) -> dict[str, Any]:
        return dict.fromkeys(self.theirs, architecture.add_bias_linear)


def number(config: Config, name: str, default: Any, kind: type, none_is_default: Any = REQUIRED, at_least: int = 1):
    """A number of ``config.json``.

    Args:
        default: where it is missing.
        none_is_default: where it is null; not given: that is refused.

    Raises:
        InputError: it is missing without a default, or no such number.
    """
    value = config.get(name, default)
    if value is REQUIRED:
        raise InputError(f"no {name}")
    if value is None and (none_is_default is not REQUIRED or default is None):
        return None if none_is_default is REQUIRED else none_is_default
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not (kind is float and isinstance(value, float)):
        raise InputError(f"{name} is {value!r}; it must be a number")
    if value < at_least if kind is int else value <= 0:
        raise InputError(f"{name} is {value!r}, which is too small")
    return kind(value)


def flag(config: Config, name: str, default: bool) -> bool:
    """Something that is on or off in ``config.json``.

    Raises:
        InputError: it is neither.
    """
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be true or false")
    return value

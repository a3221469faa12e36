"""Entries of ``config.json`` as models were published: models that transformers writes itself never have them.

``published_configs.jsonl`` has the entries of published models, with smaller sizes, and what must become of them.
"""

import ast
import copy
import inspect
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, modeling_rope_utils
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.config_entries import activation as names
from mft_megatron.convert.huggingface.config_entries.transformers_class import READ_OF_ANY_CLASS, judge, known_names
from mft_megatron.convert.huggingface.families.table import FAMILIES, family_of, note_on_unread
from mft_megatron.convert.huggingface.family import comparable
from mft_megatron.errors import InputError
from mft_megatron.mcore.model.config import activation
from mft_megatron.mcore.model.rope_frequencies import inverse_frequencies

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
LINES = [json.loads(line) for line in Path(__file__).with_name("published_configs.jsonl").read_text().splitlines()]
CONVERTED = {line["name"]: line for line in LINES if "unread" in line}
REFUSED = {line["name"]: line for line in LINES if "refused" in line}
LLAMA = CONVERTED["Llama-2-7b-hf"]["entries"]


def test_the_fixtures_have_every_family():
    assert len(CONVERTED) + len(REFUSED) == len(LINES) > 60
    assert {line["entries"]["model_type"] for line in CONVERTED.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", CONVERTED)
def test_published_models_are_read(name):
    """The architecture is that of the entries that transformers' class completes, and all that is not read is named."""
    entries, unread = CONVERTED[name]["entries"], CONVERTED[name]["unread"]
    family = family_of(entries)
    theirs = AutoConfig.for_model(**copy.deepcopy(entries))
    architecture = family.read_config(entries)
    assert comparable(architecture) == comparable(family.read_config(theirs.to_dict()))
    if architecture.scaling is not None:
        frequencies, factor = ROPE_INIT_FUNCTIONS[architecture.scaling.rope_type](theirs, "cpu")
        size, base = architecture.kv_channels, architecture.rotary_base
        torch.testing.assert_close(inverse_frequencies(size, base, architecture.scaling), frequencies)
        assert (architecture.scaling.attention_factor or 1.0) == pytest.approx(factor)
    note = note_on_unread(entries, family)
    assert (note is None) == (not unread)
    for entry in unread:
        assert entry in note


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_expressed_are_refused_for_the_right_reason(name):
    entries = REFUSED[name]["entries"]
    with pytest.raises(InputError) as refusal:
        family_of(entries).read_config(entries)
    assert REFUSED[name]["refused"] in str(refusal.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_entries_are_judged_by_the_class_of_transformers(model_type):
    """In each family: unknown ones pass and are named, those at the class's default pass, others are refused."""
    made_up = {"made_up": 3, "another": {"nested": [1]}, "null": None, "use_mrope": True}
    assert judge(model_type, made_up).unread == ["another", "made_up", "use_mrope"]
    default = transformers.AutoConfig.for_model(model_type)
    fields = {name: getattr(default, name) for name in ("chunk_size_feed_forward", "is_encoder_decoder", "use_cache")}
    assert judge(model_type, fields) == judge(model_type, {})
    changed = {"chunk_size_feed_forward": 4, "is_encoder_decoder": 1, "use_cache": 1, "base_model_tp_plan": {}}
    changed |= {"default_theta": 500.0, "_rope_type_labels": ["rope_theta"]}
    assert judge(model_type, changed).refused == sorted(changed)
    assert judge(model_type, {"layer_types": ["full_attention"] * 2, "is_causal": True}) == judge(model_type, {})
    for name, value in (("is_causal", False), ("is_causal", None), ("per_layer_config", {"0": {"head_dim": 4}})):
        assert judge(model_type, {name: value}).refused == [name]


ODD = [None, True, 0, -1, 2.5, float("nan"), "x", [], [1], {}, {"a": 1}, {"rope_type": [1]}, {"type": "linear"}]


def said_of(config):
    """The refusal of a configuration, or the note on it."""
    try:
        family = family_of(config)
        family.read_config(config)
        return note_on_unread(config, family) or ""
    except InputError as refusal:
        return str(refusal)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_any_value_is_read_or_refused_in_one_line(model_type):
    entries = next(line["entries"] for line in CONVERTED.values() if line["entries"]["model_type"] == model_type)
    for name in sorted({name for line in LINES for name in line["entries"]} | READ_OF_ANY_CLASS.keys()):
        for value in ODD:
            assert "\n" not in said_of({**entries, name: value})


ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize("given", [{ORIGINAL: 24}, {}])
@pytest.mark.parametrize(
    "scaling", [{"rope_type": "yarn"}, {"rope_type": "llama3", "low_freq_factor": 1.5, "high_freq_factor": 3.0}]
)
def test_the_original_context_beside_a_scaling_must_be_that_of_the_scaling(scaling, given):
    """transformers 5 prefers the one beside it; 4 does not read that."""
    entries = {**LLAMA, "rope_scaling": {"factor": 8.0, **scaling, **given}}
    read = given.get(ORIGINAL, LLAMA["max_position_embeddings"])
    assert said_of({**entries, ORIGINAL: read}) == said_of(entries) == ""
    theirs = AutoConfig.for_model(**copy.deepcopy(entries), **{ORIGINAL: 12})
    ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu")
    assert theirs.rope_parameters[ORIGINAL] == 12
    assert f"{ORIGINAL} is 12, but the rotary scaling has {read}" in said_of({**entries, ORIGINAL: 12})


@pytest.mark.parametrize(
    ("name", "old", "value"), [("rope_theta", "rotary_emb_base", 5e5), ("partial_rotary_factor", "rotary_pct", 0.5)]
)
def test_names_that_transformers_does_not_read_in_gpt_neox_must_agree_with_those_it_reads(name, old, value):
    entries = {**CONVERTED["gpt-neox-20b"]["entries"]}
    del entries[old]
    assert AutoConfig.for_model(**entries, **{name: value}).rope_parameters[name] != value
    assert f"it computes with {10000.0 if name == 'rope_theta' else 0.25}; give the right one as {old}" in said_of(
        {**entries, name: value}
    )
    for agreeing in ({old: value}, {"rope_parameters": {"rope_type": "default", name: value}}):
        assert said_of({**entries, **agreeing, name: value}) == said_of({**entries, **agreeing}) == ""
    assert "it must be a number" in said_of({**entries, old: -1})


def test_code_of_the_models_own_is_said_not_to_run():
    family = family_of(LLAMA)
    note = note_on_unread({**LLAMA, "auto_map": {"AutoConfig": "configuration.Own"}, "made\nup": 1}, family)
    assert "made up: not read, because transformers' LlamaConfig has no such entry" in note
    assert "auto_map: names code of the model's own, which is not run" in note


def names_read(tree, owner="config"):
    """Names of entries that code of transformers reads of a configuration, which is called ``owner`` there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(owner):
            yield node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            read_of, name = node.args[:2]
            if ast.unparse(read_of).endswith(owner) and isinstance(name, ast.Constant):
                yield name.value


def names_read_by_the_rotary_mixin():
    """Names that the base class of configurations for rotary embeddings reads of itself, except its own attributes."""
    mixin = modeling_rope_utils.RotaryEmbeddingConfigMixin
    return set(names_read(ast.parse(inspect.getsource(mixin)), "self")) - vars(mixin).keys()


# methods and properties, what a caller sets, and what only heads of other tasks or additional predictions read
HARMLESS = """
    _attn_implementation _experts_implementation _is_quantized get_text_config is_heterogeneous number_of_conv_states
    standardize_rope_params validate_rope nested_rope_parameter_keys num_labels name_or_path rope_scaling
    ignore_keys_at_rope_validation
""".split()
READ_BY_THE_FAMILIES = "rope_theta partial_rotary_factor original_max_position_embeddings".split()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_other_entry_changes_what_transformers_computes(model_type):
    """Each entry that the installed release reads of a configuration is a field of its class, or in the table here."""
    root = Path(transformers.__file__).parent
    files = [root / f"{name}.py" for name in ("masking_utils", "modeling_rope_utils", "cache_utils")]
    files += [root / "models" / model_type / f"modeling_{model_type}.py", root / "integrations" / "sdpa_attention.py"]
    read = {name for file in files for name in names_read(ast.parse(file.read_text()))}
    assert {"is_causal", "layer_types"} <= read
    of_the_mixin = names_read_by_the_rotary_mixin()
    assert {"partial_rotary_factor", "original_max_position_embeddings"} <= of_the_mixin
    known = known_names(model_type) | READ_OF_ANY_CLASS.keys() | set(HARMLESS)
    assert read <= known
    assert of_the_mixin <= known | set(READ_BY_THE_FAMILIES)


SHAPE = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "kv_channels": 4}


@pytest.mark.parametrize(
    ("synonyms", "fields"),
    [
        (names.SILU, {"swiglu": True}),
        (names.GELU, {"openai_gelu": False}),
        (names.TANH_GELU, {"openai_gelu": True}),
    ],
)
def test_names_of_one_activation_function_are_one_function(synonyms, fields):
    function, points = activation(NetworkArguments(**SHAPE, **fields)), torch.linspace(-12, 12, 5001).double()
    others = {name for group in (names.SILU, names.GELU, names.TANH_GELU) for name in group} - set(synonyms)
    for name in synonyms:
        assert (ACT2FN[name](points) - function(points)).abs().max() < 1e-9, name
    for name in [*others, "quick_gelu", "gelu_10", "relu", "mish"]:
        assert (ACT2FN[name](points) - function(points)).abs().max() > 1e-4, name

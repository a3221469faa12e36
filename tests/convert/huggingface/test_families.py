"""Every family: logits equal those of transformers, and import and export lose nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.commands.huggingface import hf_to_mcore, mcore_to_hf
from mft_megatron.convert.huggingface.config_entries.window import windowed_layers
from mft_megatron.convert.huggingface.families.table import FAMILIES, family_for, family_of
from mft_megatron.convert.huggingface.family import comparable
from mft_megatron.convert.huggingface.model_folder import read_architecture
from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
from mft_megatron.convert.peft.adapted_weights import linear_weights
from mft_megatron.errors import InputError
from mft_megatron.lora import KNOWN_TARGETS
from mft_megatron.run_folder.found import latest_checkpoint
from tests.convert import tiny_models
from tests.convert.tiny_models import MODELS
from tests.ranks import ROOT, run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
NEOX = {"add_bias_linear": True, "rotary_percent": 0.5, "parallel_residual": True, "num_query_groups": 4}
NEEDED = {"num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"}
BIASES = "llama with biases in attention"
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Checkpoint of each model and the Hugging Face folder that it was converted from, by name."""
    root, folders = tmp_path_factory.mktemp("models"), {}
    for number, name in enumerate(MODELS):
        hf, checkpoint = root / f"hf{number}", root / f"checkpoint{number}"
        tiny_models.write_model(name, hf)
        hf_to_mcore(["--hf", str(hf), "--save", str(checkpoint)])
        folders[name] = str(checkpoint), str(hf)
    return folders


def check_logits(results, names):
    results = [result for result in results if result]
    assert results
    for result in results:
        assert result.keys() == set(names)
        for name, (difference, spread) in result.items():
            assert difference < 1e-4, name
            assert spread > 1, name  # logits are not all alike


def test_logits_are_those_of_transformers(converted):
    check_logits(run_on_ranks(1, tiny_models.logit_differences, "", 1, converted), MODELS)


UNEVEN = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 1"


def test_logits_on_a_parallel_layout(converted):
    names = ("llama3 tied", "qwen2 windows", "starcoder2", "gpt-neox", "gemma in groups", BIASES)
    some = {name: converted[name] for name in names}
    check_logits(run_on_ranks(4, tiny_models.logit_differences, UNEVEN, 4, some), some)


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", " --sequence-parallel"])
def test_logits_of_all_on_a_parallel_layout(converted, extra):
    # experts under tensor parallelism need sequence parallelism; one group of heads cannot be split
    some = {name: folders for name, folders in converted.items() if name != "gemma" and (extra or name != "mixtral")}
    check_logits(run_on_ranks(4, tiny_models.logit_differences, UNEVEN + extra, 4, some), some)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["--expert-model-parallel-size 2", "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2"]
)
def test_logits_with_experts_on_several_ranks(converted, layout):
    size = 2 ** layout.count("2")
    some = {"mixtral": converted["mixtral"]}
    check_logits(run_on_ranks(size, tiny_models.logit_differences, layout, size, some), some)


@pytest.mark.slow
def test_logits_where_each_rank_has_one_group(converted):
    some = {name: converted[name] for name in ("deepseek-coder", "qwen2 windows")}
    check_logits(run_on_ranks(4, tiny_models.logit_differences, "--tensor-model-parallel-size 4", 4, some), some)


def weights_of(folder):
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights.update(load_file(file))
    return weights


def assert_same_folder(one, other):
    weights, expected = weights_of(other), weights_of(one)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == expected[name].dtype
        assert weight.contiguous().view(torch.uint8).equal(expected[name].contiguous().view(torch.uint8)), name
    for file in FILES:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export_change_nothing(converted, name, tmp_path):
    checkpoint, hf = converted[name]
    mcore_to_hf(["--load", checkpoint, "--hf", str(tmp_path / "back"), "--max-shard-size", "60KB"])
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert_same_folder(Path(hf), tmp_path / "back")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["qwen2 tied", "starcoder2"])
def test_half_precision_stays_as_it_is(name, dtype, tmp_path, monkeypatch):
    """Every bit of subnormal and largest numbers is kept, also in slices of a few rows."""
    from mft_megatron.convert.huggingface import converted_checkpoint, model_import

    tiny_models.write_model(name, tmp_path / "hf", dtype)
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    weights, largest = load_file(file), 0x7F7F if dtype == "bfloat16" else 0x7BFF
    weights["model.embed_tokens.weight"].view(torch.int16)[:3] = torch.tensor([1, -32768, largest])[:, None]
    tiny_models.save_weights(weights, file)
    monkeypatch.setattr(model_import, "BLOCK_BYTES", 700)
    monkeypatch.setattr(converted_checkpoint, "FILE_BYTES", 2000)
    hf_to_mcore(["--hf", str(tmp_path / "hf"), "--save", str(tmp_path / "checkpoint")])
    assert len(list((tmp_path / "checkpoint" / "iter_0000000").glob("*.distcp"))) > 20
    mcore_to_hf(["--load", str(tmp_path / "checkpoint"), "--hf", str(tmp_path / "back")])
    assert_same_folder(tmp_path / "hf", tmp_path / "back")


def as_transformers_4(config):
    """The same configuration as transformers 4 spells it."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    theta, percent = ("rotary_emb_base", "rotary_pct") if old["model_type"] == "gpt_neox" else ("rope_theta", "")
    old[theta] = rope.pop("rope_theta")
    if percent:
        old[percent] = rope.pop("partial_rotary_factor")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else {"type": rope.pop("rope_type"), **rope}
    old.pop("layer_types", None)
    return old


@pytest.mark.parametrize("name", MODELS)
def test_both_spellings_say_the_same(converted, name):
    config = json.loads((Path(converted[name][1]) / "config.json").read_text())
    family = family_of(config)
    expected, old = family.read_config(config), as_transformers_4(config)
    assert old.keys() != config.keys()
    assert family_of(old).read_config(old) == expected
    both = {**config, **old}
    assert family_of(both).read_config(both) == expected
    with pytest.raises(InputError, match="rope"):
        family.read_config({**config, "rope_theta": 77.0})


def reading(family, config):
    """The meaning of a configuration, or the reason that it is refused."""
    try:
        return comparable(family.read_config(config))
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("name", MODELS)
def test_missing_entries_have_the_defaults_of_transformers(converted, name):
    """Remove one entry at a time: the architecture must be the one that transformers' defaults give."""
    from transformers import AutoConfig

    config = json.loads((Path(converted[name][1]) / "config.json").read_text())
    family, tried = family_of(config), 0
    for key in sorted(family.entry_names() & config.keys() - {"vocab_size"}):
        less = {other: value for other, value in config.items() if other != key}
        if key in NEEDED:
            with pytest.raises(InputError, match=f"no {key}"):
                family.read_config(less)
            continue
        filled = {**AutoConfig.for_model(**less).to_dict(), "vocab_size": 131}
        tried += 1
        assert reading(family, less) == reading(family, filled), key
    assert tried > 4


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_a_configuration_written_here(converted, name):
    """Models that were trained here from the beginning have no other configuration than the one written here."""
    from transformers import AutoConfig

    family, architecture, _ = read_architecture(Path(converted[name][1]))
    written = {**family.write_config(architecture), "vocab_size": 131}
    assert family_of(written) is family
    assert comparable(family.read_config(written)) == comparable(architecture)
    theirs = AutoConfig.for_model(**written).to_dict()
    assert comparable(family.read_config(theirs)) == comparable(architecture)
    assert family.refuses(architecture) is None
    assert family_for(architecture).refuses(architecture) is None


@pytest.mark.parametrize(
    ("frequency", "expected"),
    [
        (None, [True] * 7),
        (3, [True, True, False, True, True, False, True]),  # layers count from 1, as in Megatron-Core
        ("[1,0,0,1,1,1,0]", [True, False, False, True, True, True, False]),
    ],
)
def test_layers_with_a_window(frequency, expected):
    shape = {"num_layers": 7, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "kv_channels": 4}
    architecture = NetworkArguments(**shape, window_size="4,0", window_attn_skip_freq=frequency)
    assert windowed_layers(architecture) == expected
    assert windowed_layers(NetworkArguments(**shape, window_attn_skip_freq=frequency)) == [False] * 7


def test_the_precision_of_a_folder_is_that_of_its_largest_weight(tmp_path):
    tiny_models.write_model("llama", tmp_path / "hf", "bfloat16")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    tiny_models.save_weights(weights, tmp_path / "hf" / "model.safetensors")
    hf_to_mcore(["--hf", str(tmp_path / "hf"), "--save", str(tmp_path / "checkpoint")])
    assert latest_checkpoint(tmp_path / "checkpoint").info.precision == "bf16"
    assert HuggingFaceSource(str(tmp_path / "hf")).info.precision == "bf16"


CODEGEMMA = {  # as it was published, without irrelevant entries
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}


def test_published_configurations_of_gemma_are_one_architecture():
    found = family_of(CODEGEMMA).read_config(CODEGEMMA)
    assert (found.num_query_groups, found.kv_channels, found.openai_gelu, found.tie_embeddings) == (1, 256, True, True)
    # the first releases have "gelu" for the approximation; transformers 4 uses it where the new name is missing
    for changes in ({"hidden_act": "gelu"}, {"hidden_activation": None}, {"hidden_act": "gelu_new"}):
        assert family_of(CODEGEMMA).read_config({**CODEGEMMA, **changes}) == found
    del (old := dict(CODEGEMMA))["hidden_activation"]
    assert family_of(old).read_config(old) == found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        # transformers 4 would use the exact GELU, transformers 5 the approximation
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu', which this program cannot express in this"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu', which"),
        ({"hidden_act": None}, "hidden_act is None, which"),
        ({"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM is not supported"),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM is not supported"),
        ({"model_type": "gemma3", "architectures": None}, "model_type 'gemma3' is not supported; known are Llama"),
        ({"is_causal": False}, "is_causal: not understood for Gemma"),
    ],
)
def test_other_models_than_gemma_are_refused(changes, reason):
    config = {**CODEGEMMA, **changes}
    with pytest.raises(InputError, match=reason):
        family_of(config).read_config(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_are_scaled_in_the_precision_of_the_model(dtype):
    from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

    from mft_megatron.mcore.model.embedding import scale

    theirs = GemmaTextScaledWordEmbedding(7, 3072, 0, embed_scale=3072**0.5).to(dtype)
    scaled = torch.nn.functional.embedding(torch.arange(7), theirs.weight) * scale(3072, dtype)
    assert scaled.dtype == dtype
    assert scaled.equal(theirs(torch.arange(7)))


def test_a_family_is_chosen_by_what_it_can_express():
    base = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 64,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "max_position_embeddings": 64,
    }
    gelu = {"normalization": "LayerNorm", "swiglu": False, "openai_gelu": True}
    gemma = {
        "swiglu": False,
        "gated_linear_unit": True,
        "openai_gelu": True,
        "apply_layernorm_1p": True,
        "scale_embeddings_by_hidden_size": True,
    }
    for changes, name in (
        ({}, "Llama"),
        ({"add_bias_linear": True}, "Llama"),
        ({"add_qkv_bias": True}, "Qwen2"),
        ({"add_attention_bias": True}, "Llama"),
        ({"add_mlp_bias": True}, "Llama"),
        ({"add_attention_bias": True, "add_mlp_bias": True, "add_qkv_bias": True}, "Llama"),
        ({"add_attention_bias": True, "qk_layernorm": True}, "Qwen3"),
        ({"add_attention_bias": True, **gemma}, "Gemma"),
        ({"qk_layernorm": True}, "Qwen3"),
        ({"window_size": "7,0"}, "Mistral"),
        ({"window_size": "7,0", "window_attn_skip_freq": 2, "add_qkv_bias": True}, "Qwen2"),
        ({**gelu, "add_bias_linear": True}, "StarCoder2"),
        ({"num_experts": 4}, "Mixtral"),
        (gemma, "Gemma"),
        ({"normalization": "LayerNorm", "swiglu": False, **NEOX}, "GPT-NeoX"),
        ({"normalization": "LayerNorm", "swiglu": False, **NEOX, "rotary_percent": 1.0}, "GPT-NeoX"),
    ):
        assert family_for(NetworkArguments(**{**base, **changes})).name == name
    for changes, reason in (
        ({"qk_layernorm": True, "add_qkv_bias": True}, "Qwen3: qkv_bias is True, Qwen3 has False"),
        ({"normalization": "LayerNorm"}, "Llama: normalization is LayerNorm, Llama has RMSNorm"),
        ({**gelu, "openai_gelu": False}, "StarCoder2: openai_gelu is False, StarCoder2 has True"),
        ({"num_experts": 4, "moe_layer_freq": 2}, "Mixtral: moe_layer_freq is 2, Mixtral has 1"),
        ({**gemma, "openai_gelu": False}, "Gemma: openai_gelu is False, Gemma has True"),
        ({**gemma, "apply_layernorm_1p": False}, "Gemma: apply_layernorm_1p is False, Gemma has True"),
        ({"scale_embeddings_by_hidden_size": True}, "Llama: scale_embeddings_by_hidden_size is True, Llama has False"),
        ({"rotary_percent": 0.5}, "Llama: rotary_percent is 0.5, Llama has 1.0"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type is learned_absolute"),
    ):
        with pytest.raises(InputError, match=reason):
            family_for(NetworkArguments(**{**base, **changes}))


def test_every_family_has_a_model_here():
    import transformers

    model_types = {getattr(transformers, f"{kind}Config").model_type for kind, _ in MODELS.values()}
    assert model_types == FAMILIES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_a_family_can_be_named_as_a_target_of_adapters(converted, name):
    """A family whose matrices have new names needs them in ``mft_megatron/lora.py``."""
    family, architecture, _ = read_architecture(Path(converted[name][1]))
    matrices = [hf_name for weight in linear_weights(family, architecture).values() for hf_name in weight.hf_names]
    assert {hf_name.split(".")[-2] for hf_name in matrices} <= set(KNOWN_TARGETS)


def test_the_readme_names_every_family():
    text = (ROOT / "README.md").read_text()
    assert [family.name for family in FAMILIES.values() if family.name not in text] == []

"""Export of adapters to PEFT: for every family PEFT computes the logits of the model with W + scale · B A."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from mft_megatron.convert.commands.peft import lora_to_peft
from mft_megatron.convert.peft.adapted_weights import family_of_info, stacked_shapes
from mft_megatron.convert.peft.weight_source import AdapterSource
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from mft_megatron.run_folder.names import HUGGINGFACE, TOKENIZER
from tests.convert import made_adapters, tiny_models
from tests.convert.made_adapters import RANK
from tests.refusals import refused_call

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT
WHOLE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
# by model: targets, and whether rsLoRA
CASES = {
    "llama": (WHOLE, False),
    "llama3 tied": (("linear_fc1", "q_proj", "k_proj", "v_proj"), True),
    "llama with biases": (("all-linear",), True),
    "qwen2 tied": (("q_proj", "v_proj"), False),
    "qwen3": (("k_proj", "gate_proj", "linear_fc2"), False),
    "mistral": (("linear_qkv", "up_proj", "o_proj"), False),
    "gemma": (WHOLE, False),
    "mixtral": (("linear_qkv", "linear_proj"), False),
    "gpt-neox": (("q_proj", "v_proj", "dense_h_to_4h", "linear_proj"), False),
    "gpt-neox in turn tied": (WHOLE, True),
    "starcoder2": (("all-linear",), False),
    "starcoder2 without biases": (("linear_qkv", "c_fc"), True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from a model's name to its Hugging Face folder and its description."""
    root, written = tmp_path_factory.mktemp("peft"), {}

    def model(name):
        if name not in written:
            folder = root / f"hf{len(written)}"
            tiny_models.write_model(name, folder)
            written[name] = folder, made_adapters.info_of(folder)
        return written[name]

    return model


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_merged_matrices(models, name, tmp_path):
    hf, info = models(name)
    names, rslora = CASES[name]
    lora, weights = made_adapters.write_random_adapters(tmp_path / "run", info, names, rslora=rslora)
    lora_to_peft(["--load", str(tmp_path / "run"), "--hf", str(tmp_path / "adapter")])
    logits = made_adapters.logits_of(made_adapters.load_with_adapter(hf, tmp_path / "adapter"))
    plain = made_adapters.load(hf)
    before = made_adapters.logits_of(plain)
    merged = made_adapters.add_deltas(plain, made_adapters.deltas_of(info, lora, weights))
    expected = made_adapters.logits_of(merged)
    assert (logits - expected).abs().max() < 1e-4
    assert (before - expected).abs().max() > 0.5  # the adapters matter
    # read back, A's are one where they were one, and several where they were concatenated, bit by bit
    source = AdapterSource(str(tmp_path / "adapter"), info)
    assert source.lora == lora
    stored_shapes = stacked_shapes(source.weights, info.architecture["num_layers"])
    assert stored_shapes == {key: tuple(content.shape) for key, content in weights.items()}
    for key, content in weights.items():
        for layer in range(len(content)):
            wanted = WeightSlice(key, (layer,), (0, 0), tuple(content.shape[1:]))
            assert source.read(wanted).equal(content[layer]), key


def test_cases_have_every_family():
    kinds = {tiny_models.MODELS[name][0] for name in CASES}
    assert kinds == {kind for kind, _ in tiny_models.MODELS.values()}


@pytest.fixture
def adapted(models, tmp_path):
    """A checkpoint of a GPT-NeoX with an A for queries and one for values, which it has in one matrix."""
    hf, info = models("gpt-neox")
    names = ("q_proj", "v_proj", "linear_proj")
    made_adapters.write_random_adapters(tmp_path / "run", info, names, "bfloat16", base=str(hf))
    return tmp_path / "run"


def export(run):
    lora_to_peft(["--load", str(run), "--hf", str(run.parent / "adapter")])
    return run.parent / "adapter"


def test_a_fused_matrix_has_the_rank_of_all_its_adapters(adapted):
    """Its rank and alpha are twice those of other matrices, the scale is the same; dtypes are kept."""
    config = json.loads((export(adapted) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (RANK, 5, 0.05)
    assert config["rank_pattern"] == {"query_key_value": 2 * RANK}
    assert config["alpha_pattern"] == {"query_key_value": 10}
    assert config["target_modules"] == ["dense", "query_key_value"]
    assert (config["task_type"], config["bias"], config["fan_in_fan_out"]) == ("CAUSAL_LM", "none", False)
    weights = load_file(adapted.parent / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert len(weights) == 2 * 2 * 3
    key = "base_model.model.gpt_neox.layers.2.attention.query_key_value.lora_B.weight"
    b = weights[key].view(4, 3, 12, 2, RANK)  # heads; query, key, value; rows; parts
    for source, part in ((0, 0), (2, 1)):
        assert (b[:, source, :, part] != 0).all()
        assert (b[:, source, :, 1 - part] == 0).all()
    assert (b[:, 1] == 0).all()


def test_equal_ranks_need_no_patterns(models, tmp_path):
    _, info = models("gpt-neox")
    made_adapters.write_random_adapters(tmp_path / "run", info, ("q_proj", "k_proj"), rslora=True)
    config = json.loads((export(tmp_path / "run") / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (2 * RANK, {}, {})
    assert config["lora_alpha"] / (2 * RANK) ** 0.5 == pytest.approx(5.0 / RANK**0.5)
    assert config["use_rslora"] is True


@pytest.mark.parametrize("base", ["", "an HF folder", "a checkpoint"])
def test_the_name_of_the_base_model(models, tmp_path, base):
    """The folder of the base is named if PEFT can load it; --base-model-name takes precedence."""
    hf, info = models("qwen2 tied")
    folder = {"": "", "an HF folder": str(hf), "a checkpoint": str(tmp_path / "iter_0000001")}[base]
    made_adapters.write_random_adapters(tmp_path / "run", info, ("q_proj",), base=folder)
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "mft_checkpoint.json").write_text("{}")
    config = json.loads((export(tmp_path / "run") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (str(hf) if base == "an HF folder" else None)
    lora_to_peft(["--load", str(tmp_path / "run"), "--hf", str(tmp_path / "b"), "--base-model-name", "org/model"])
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/model"


def test_the_tokenizer_is_exported(adapted, tmp_path):
    source, tokenizer = adapted / HUGGINGFACE, adapted / TOKENIZER
    for folder, text in ((source, "of the model"), (tokenizer, "of the run")):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(text)
    (source / "config.json").write_text("{}")
    (source / "tokenizer_extra.txt").write_text("more")
    written = export(adapted)
    assert (written / "tokenizer.json").read_text() == "of the run"
    assert not (written / "config.json").exists()
    assert not (written / "tokenizer_extra.txt").exists()
    (tokenizer / "tokenizer.json").write_text("of the model")
    lora_to_peft(["--load", str(adapted), "--hf", str(tmp_path / "b")])
    assert (tmp_path / "b" / "tokenizer_extra.txt").read_text() == "more"
    lora_to_peft(["--load", str(adapted), "--hf", str(tmp_path / "c"), "--tokenizer-model", str(tokenizer)])
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]


def lose_a_matrix(info, weights):
    del weights["decoder.layers.self_attention.linear_proj.lora_b"]
    return info, "has no decoder.layers.self_attention.linear_proj.lora_b"


def add_a_matrix(info, weights):
    weights["decoder.layers.mlp.linear_fc1.lora_a"] = torch.zeros(3, 3, 48)
    return info, "has unexpected decoder.layers.mlp.linear_fc1.lora_a"


def cut_a_matrix(info, weights):
    key = "decoder.layers.self_attention.linear_qkv.lora_a"
    weights[key] = weights[key][:, 1:].contiguous()
    return info, "has the shape [3, 2, 48], its description says [3, 3, 48]; the checkpoint is damaged"


def no_adapters(info, weights):
    info["lora"] = None
    return info, "has no adapters; mcore-to-hf exports its model"


def damaged_description(info, weights):
    del info["lora"]["targets"]
    return info, "not a checkpoint description (Object missing required field `targets`); "


@pytest.mark.parametrize(
    "change", [lose_a_matrix, add_a_matrix, cut_a_matrix, no_adapters, damaged_description], ids=lambda f: f.__name__
)
def test_bad_checkpoints(models, tmp_path, change):
    _, info = models("qwen2 tied")
    lora = made_adapters.lora_for(info, ("linear_qkv", "linear_proj"))
    weights = made_adapters.random_adapters(info, lora)
    fields, reason = change({"lora": lora.as_dict()}, weights)
    made_adapters.write_run(tmp_path / "run", info, weights, has_base=False, **fields)
    assert reason in refused_call(export, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_exports_that_are_refused(adapted, models, tmp_path):
    from mft_megatron.convert.commands.huggingface import mcore_to_hf

    with pytest.raises(InputError, match="has adapters; merge-lora writes the model with them merged into it, lora-to"):
        mcore_to_hf(["--load", str(adapted), "--hf", str(tmp_path / "b")])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "file").write_text("")
    with pytest.raises(InputError, match="adapter: exists already; remove it"):
        export(adapted)
    _, info = models("mixtral")
    made_adapters.write_random_adapters(tmp_path / "experts", info, ("linear_fc1",))
    with pytest.raises(InputError, match="linear_fc1: Mixtral has experts there, which cannot have adapters"):
        lora_to_peft(["--load", str(tmp_path / "experts"), "--hf", str(tmp_path / "b")])
    assert not (tmp_path / "b").exists()


def test_the_family_is_that_of_the_original(models):
    """A Mistral without a window computes what a Llama computes, and stays a Mistral."""
    _, info = models("mistral")
    info = dataclasses.replace(info, architecture={**info.architecture, "window_size": None})
    assert family_of_info(info)[0].name == "Mistral"
    assert family_of_info(dataclasses.replace(info, source=""))[0].name == "Llama"

"""Import of adapters that PEFT made: import and export change nothing, and inexpressible adapters are refused."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from mft_megatron.convert.commands.peft import lora_to_peft
from mft_megatron.convert.peft.adapted_weights import stacked_shapes
from mft_megatron.convert.peft.weight_source import AdapterSource
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from tests.convert import made_adapters, tiny_models
from tests.refusals import refused_call

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# by model: PEFT's targets, other settings, and the parts of the targets that are read
MADE = {
    "llama": (["q_proj", "v_proj", "up_proj"], {}, {"linear_qkv": ((0,), (2,)), "linear_fc1": ((1,),)}),
    "qwen2 tied": ("all-linear", {"use_rslora": True}, {"linear_qkv": ((0,), (1,), (2,)), "linear_fc2": ((0,),)}),
    "gpt-neox": (["query_key_value", "dense_4h_to_h"], {}, {"linear_qkv": ((0, 1, 2),), "linear_fc2": ((0,),)}),
    "starcoder2": (r".*\.(c_fc|o_proj)", {"rank_pattern": {"c_fc": 4}}, {"linear_fc1": ((0,),)}),
    "mixtral": (["k_proj", "o_proj"], {"lora_dropout": 0.1}, {"linear_qkv": ((1,),), "linear_proj": ((0,),)}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from a model's name to its description and the folder of a random adapter that PEFT made."""
    from peft import LoraConfig, get_peft_model

    root, written = tmp_path_factory.mktemp("made"), {}

    def adapter(name):
        if name not in written:
            hf, folder = root / f"hf{len(written)}", root / f"adapter{len(written)}"
            tiny_models.write_model(name, hf)
            targets, settings, _ = MADE[name]
            torch.manual_seed(1)
            config = LoraConfig(
                r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **settings
            )
            get_peft_model(made_adapters.load(hf, "float32"), config).save_pretrained(folder)
            written[name] = made_adapters.info_of(hf), folder
        return written[name]

    return adapter


@pytest.mark.parametrize("name", MADE)
def test_import_and_export_change_nothing(made, name, tmp_path):
    info, folder = made(name)
    source = AdapterSource(str(folder), info)
    parts = {target.module: target.parts for target in source.lora.targets}
    assert MADE[name][2].items() <= parts.items()
    assert (source.lora.rank, source.lora.alpha) == (4, 6)
    weights = {
        key: torch.stack([source.read(WeightSlice(key, (layer,), (0, 0), shape[1:])) for layer in range(shape[0])])
        for key, shape in stacked_shapes(source.weights, info.architecture["num_layers"]).items()
    }
    made_adapters.write_adapters(tmp_path / "run", info, source.lora, weights)
    lora_to_peft(["--load", str(tmp_path / "run"), "--hf", str(tmp_path / "back")])
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    for key, weight in before.items():
        assert weight.equal(after[key]), key
    configs = [json.loads((path / CONFIG).read_text()) for path in (folder, tmp_path / "back")]
    for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "peft_type", "bias", "task_type"):
        assert configs[0][key] == configs[1][key], key


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
@pytest.mark.parametrize("names", [("linear_qkv", "linear_fc1"), ("q_proj", "v_proj")])
def test_any_slice_equals_that_of_the_whole(tmp_path, name, names):
    """Slices that several ranks read, across the boundaries of sources and of A's."""
    tiny_models.write_model(name, tmp_path / "hf")
    info = made_adapters.info_of(tmp_path / "hf")
    _, weights = made_adapters.write_random_adapters(tmp_path / "run", info, names)
    lora_to_peft(["--load", str(tmp_path / "run"), "--hf", str(tmp_path / "adapter")])
    source = AdapterSource(str(tmp_path / "adapter"), info)
    for key, whole in weights.items():
        for rows in (1, 5, 7, whole.shape[1]):
            for first in range(0, whole.shape[1] - rows + 1, rows):
                columns = whole.shape[2] // 2
                for begin in (0, columns):
                    read = source.read(WeightSlice(key, (2,), (first, begin), (rows, columns)))
                    assert read.equal(whole[2, first : first + rows, begin : begin + columns]), (key, first, begin)
    with pytest.raises(InputError, match=r"has no decoder.layers.mlp.linear_fc2.lora_a; it is LoRA of rank 3"):
        source.read(WeightSlice("decoder.layers.mlp.linear_fc2.lora_a", (0,), (0, 0), (1, 1)))


@pytest.fixture
def adapter(made, tmp_path):
    info, folder = made("llama")
    shutil.copytree(folder, tmp_path / "adapter")
    return info, tmp_path / "adapter"


def refusal(info, folder):
    line = refused_call(AdapterSource, str(folder), info)
    assert str(folder) in line
    return line


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA can be expressed"),
        ({"peft_type": None}, "peft_type is None"),
        ({"bias": "lora_only"}, "bias is 'lora_only': trained biases cannot be expressed"),
        ({"use_dora": True}, "use_dora is true: DoRA cannot be expressed"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"]: whole matrices'),
        ({"layers_to_transform": [0, 1]}, "layers_to_transform is [0, 1]: an adapter must be on every layer"),
        ({"target_parameters": ["w"]}, "target_parameters is"),
        ({"trainable_token_indices": [3]}, "trained rows of the embedding"),
        ({"lora_bias": True}, "lora_bias is true: biases in adapters"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true: transposed"),
        ({"use_qalora": True}, "use_qalora is true: not understood"),
        ({"of_the_future": {"a": 1}}, 'of_the_future is {"a": 1}: not understood'),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"r": 5}, "lora_A.weight has the shape [4, 48], a Llama of this size and rank 5 needs [5, 48]"),
        ({"r": "4"}, 'r is "4"; it must be a whole number from 1'),
        ({"r": 0}, "r is 0; it must be a whole number from 1"),
        ({"lora_alpha": None}, "lora_alpha is null; it must be a number"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; it must be a number from 0 below 1"),
        ({"use_rslora": 1}, "use_rslora is 1; it must be true or false"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '(' is no regular expression"),
        ({"rank_pattern": [3]}, "rank_pattern is [3]; it must be an object"),
        ({"alpha_pattern": {"q_proj": 7}}, "several ranks or alphas (rank 4 with alpha 6 and rank 4 with alpha 7;"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configurations_that_are_refused(adapter, changes, reason):
    info, folder = adapter
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    assert reason in refusal(info, folder)


@pytest.mark.parametrize("rank", [1, 3])
def test_another_rank_in_one_layer_of_a_fused_matrix_is_refused(made, tmp_path, rank):
    from peft import LoraConfig, get_peft_model

    info, _ = made("gpt-neox")
    tiny_models.write_model("gpt-neox", tmp_path / "hf")
    config = LoraConfig(
        r=6,
        lora_alpha=6,
        target_modules=["query_key_value"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        rank_pattern={"layers.1.attention.query_key_value": rank},
    )
    get_peft_model(made_adapters.load(tmp_path / "hf", "float32"), config).save_pretrained(tmp_path / "adapter")
    assert "several ranks or alphas" in refusal(info, tmp_path / "adapter")


def test_entries_without_effect_are_ignored(adapter):
    info, folder = adapter
    config = json.loads((folder / CONFIG).read_text())
    before = AdapterSource(str(folder), info).lora
    more = {"exclude_modules": "nothing", "revision": "main", "of_the_future": None, "init_lora_weights": "gaussian"}
    (folder / CONFIG).write_text(json.dumps({**config, **more, "alpha_pattern": {"other": 3}}))
    assert AdapterSource(str(folder), info).lora == before


HEAD, Q0 = "base_model.model.lm_head.", "base_model.model.model.layers.0.self_attn.q_proj."
A0 = Q0 + "lora_A.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop(Q0 + "lora_B.weight"), f"{Q0}lora_B.weight is missing"),
        (lambda w: [w.pop(Q0 + x) for x in ("lora_A.weight", "lora_B.weight")], "no adapter on model.layers.0.self_at"),
        (lambda w: w.update({Q0 + "lora_magnitude_vector": torch.ones(64)}), "DoRA cannot be expressed"),
        (lambda w: w.update({Q0 + "lora_B.bias": torch.ones(64)}), "trained biases cannot"),
        (
            lambda w: w.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 131)}),
            "embeddings",
        ),
        (
            lambda w: w.update({"base_model.model.lm_head.weight": torch.ones(131, 48)}),
            "lm_head.weight: whole matrices",
        ),
        (lambda w: w.update({"something": torch.ones(1)}), "something: not understood"),
        (
            lambda w: w.update({HEAD + "lora_A.weight": w[A0]}),
            "has an adapter on lm_head; embeddings, output layer, routers and experts cannot have one",
        ),
        (
            lambda w: w.update({Q0.replace(".0.", ".3.") + "lora_A.weight": torch.ones(4, 48)}),
            "a Llama of this size has no such matrix: it is the adapter of another model",
        ),
        (
            lambda w: w.update({Q0 + "lora_B.weight": torch.ones(48, 4)}),
            "lora_B.weight has the shape [48, 4], a Llama of this size and rank 4 needs [64, 4]",
        ),
        (lambda w: w.clear(), "holds no weights"),
    ],
)
def test_weights_that_are_refused(adapter, change, reason):
    info, folder = adapter
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file({key: weight.clone() for key, weight in weights.items()}, folder / WEIGHTS)
    assert reason in refusal(info, folder)


def test_damaged_folders(adapter):
    info, folder = adapter
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-8])
    assert "download it again" in refusal(info, folder)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"no")
    assert "its header is damaged" in refusal(info, folder)
    (folder / WEIGHTS).unlink()
    assert f"has no {WEIGHTS}; give the folder of a whole PEFT adapter" in refusal(info, folder)
    torch.save({}, folder / "adapter_model.bin")
    assert "no safetensors file; load the adapter with PEFT and write it again with save_pretrained" in refusal(
        info, folder
    )
    (folder / CONFIG).write_text("[]")
    assert "not a JSON object" in refusal(info, folder)
    (folder / CONFIG).write_text("{")
    assert "not JSON" in refusal(info, folder)
    (folder / CONFIG).unlink()
    assert "has no adapter_config.json; give the folder of a PEFT adapter" in refusal(info, folder)
    assert "is no folder" in refusal(info, folder / "absent")


def test_an_adapter_of_another_model(made, adapter):
    _, folder = adapter
    assert "it is the adapter of another model" in refusal(made("gpt-neox")[0], folder)


def test_adapters_that_are_not_finite_are_named(made, tmp_path):
    info, folder = made("llama")
    shutil.copytree(folder, tmp_path / "adapter")
    weights = load_file(folder / WEIGHTS)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    weights[key][3, 2] = float("nan")
    save_file(weights, tmp_path / "adapter" / WEIGHTS)
    source = AdapterSource(str(tmp_path / "adapter"), info)
    name = "decoder.layers.self_attention.linear_qkv.lora_b"
    shape = stacked_shapes(source.weights, 2)[name][1:]
    wanted = [WeightSlice(name, (layer,), (0, 0), shape) for layer in (0, 1)]
    source.read(wanted[0])
    for read in (lambda: source.read(wanted[1]), lambda: source.factors("model.layers.1.self_attn.v_proj.weight")):
        assert f"{WEIGHTS}: {key} has NaN in it, and every loss would be NaN; the adapter is" in refused_call(read)


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("key", "cause"),
    [
        (f"module.{KEY}", "named as DistributedDataParallel names it"),
        (KEY.replace("layers.1.", "layers.1._orig_mod."), "named as torch.compile names it"),
        (KEY.replace("lora_B.", "lora_B.default."), "named as in the state dict of a whole PeftModel"),
        (KEY.removeprefix("base_model.model."), "does not begin with base_model.model. once"),
        (f"base_model.model.{KEY}", "does not begin with base_model.model. once"),
    ],
)
def test_names_that_peft_does_not_write(adapter, key, cause):
    info, folder = adapter
    weights = load_file(folder / WEIGHTS)
    weights[key] = weights.pop(KEY)
    save_file(weights, folder / WEIGHTS)
    assert f"{key}: {cause}; write the adapter with PEFT's save_pretrained" in refusal(info, folder)

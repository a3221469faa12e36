"""A wrong or damaged folder is refused in one line, and nothing is left on disk."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file

from mft_megatron.convert.commands.huggingface import hf_to_mcore, mcore_to_hf
from mft_megatron.convert.huggingface import weight_source
from mft_megatron.convert.huggingface.safetensors_reader import WeightFiles
from mft_megatron.convert.huggingface.safetensors_writer import PlannedWeight, ShardWriter
from mft_megatron.errors import InputError, run_command
from tests.convert import tiny_models
from tests.full_disk import largest_file
from tests.refusals import refused_call

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An untied Llama in several shards, and its checkpoint."""
    root = tmp_path_factory.mktemp("whole")
    tiny_models.write_model("llama", root / "one")
    hf_to_mcore(["--hf", str(root / "one"), "--save", str(root / "checkpoint")])
    mcore_to_hf(["--load", str(root / "checkpoint"), "--hf", str(root / "hf"), "--max-shard-size", "60KB"])
    return root


@pytest.fixture
def model(whole, tmp_path):
    shutil.copytree(whole / "hf", tmp_path / "hf")
    return tmp_path / "hf"


def refusal(model, *options):
    """The message that refuses a folder."""
    target = model.parent / "checkpoint"
    line = refused_call(hf_to_mcore, ["--hf", str(model), "--save", str(target), *options])
    assert [path.name for path in model.parent.iterdir()] == [model.name]
    return line


def change_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    config.update(changes)
    (model / "config.json").write_text(json.dumps({name: v for name, v in config.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel is not supported; known are Ll",
        ),
        ({"model_type": "absent"}, 'no model_type, and architectures says LlamaForCausalLM; add "model_type": "llama"'),
        ({"model_type": "absent", "architectures": []}, "no model_type, and architectures says nothing; add"),
        ({"model_type": "absent", "architectures": ["FooForCausalLM"]}, "FooForCausalLM is not supported"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2', but architectures says LlamaForCausalLM; correct the one"),
        ({"architectures": "FooForCausalLM"}, "FooForCausalLM is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights cannot be converted"),
        ({"chunk_size_feed_forward": 2}, "chunk_size_feed_forward: not understood for Llama"),
        ({"is_causal": False, "head_size": 3}, "is_causal: not understood for Llama, and it may change"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: not understood"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which this program cannot express; only 'silu'"),
        ({"mlp_bias": True}, "model.layers.0.mlp.down_proj.bias, model.layers.0.mlp.gate_proj.bias"),
        ({"attention_bias": True}, "model.layers.0.self_attn.k_proj.bias, model.layers.0.self_attn.o_proj.bias"),
        ({"mlp_bias": 1}, "mlp_bias is 1; it must be true or false"),
        ({"hidden_size": "absent"}, "no hidden_size"),
        ({"hidden_size": "48"}, "hidden_size is '48'; it must be a whole number"),
        ({"hidden_size": 48.0}, "hidden_size is 48.0; it must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, which is too small"),
        ({"vocab_size": "absent"}, "no vocab_size"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        ({"head_dim": None, "num_attention_heads": 5}, "hidden_size 48 is not divisible by num_attention_heads 5"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic': give one of linear, llama3",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear needs factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "factor is -1; it must be a number above 0"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "unknown mrope_section"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "long": 1}}, "yarn has no long"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ from layer to layer"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}},
            "rope_theta is '1e4'; it must be a number",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1.5}},
            "rope_theta is 1.5; it must be a number from 2",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters say different things"),
        ({"num_hidden_layers": 4}, "config.json says num_hidden_layers 4, and there are no weights of layer 3"),
        ({"num_hidden_layers": 2}, "6 more are stored, and config.json says num_hidden_layers 2; correct it"),
        ({"vocab_size": 132}, "embed_tokens.weight has the shape [131, 48], config.json says [132, 48]"),
        ({"head_dim": 8}, "self_attn.q_proj.weight has the shape [64, 48], config.json says [32, 48]"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
    ids=lambda value: value[:25].replace(" ", "-") if isinstance(value, str) else "",
)
def test_configurations(model, changes, reason):
    change_config(model, **changes)
    assert reason in refusal(model)


def shards(model):
    return sorted(model.glob("*.safetensors"))


def lose_shard(model):
    shards(model)[1].unlink()
    return "names model-00002-of"


def cut_off(model):
    shard = shards(model)[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    return "its header says"


def cut_off_header(model):
    shard = shards(model)[0]
    shard.write_bytes(shard.read_bytes()[:60])
    return "cut off, or no safetensors file"


def empty(model):
    shards(model)[0].write_bytes(b"")
    return "cut off, or no safetensors file"


def too_long(model):
    shard = shards(model)[0]
    shard.write_bytes(shard.read_bytes() + b"\0" * 4)
    return "its header says"


def garble_header(model):
    shard = shards(model)[0]
    content = bytearray(shard.read_bytes())
    content[8] = ord("?")
    shard.write_bytes(content)
    return "its header is damaged"


def wrong_offsets(model):
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [48], "data_offsets": [0, 4]}}).encode()
    shards(model)[0].write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    return "model.norm.weight has 4 bytes for (48,)"


def fp8(model):
    header = json.dumps({"model.norm.weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    shards(model)[0].write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    return "model.norm.weight is F8_E4M3; only F32, BF16, F16 can be converted"


def change_weights(model, change):
    weights = load_file(shards(model)[0])
    change(weights)
    tiny_models.save_weights(weights, shards(model)[0])


def lack_weight(model):
    change_weights(model, lambda weights: weights.pop("model.embed_tokens.weight"))
    return "lacks model.embed_tokens.weight, which model.safetensors.index.json says is there"


def extra_weight(model):
    change_weights(model, lambda weights: weights.update(stray=torch.zeros(3)))
    return "has stray, which model.safetensors.index.json does not say is there"


def another_dtype(model):
    change_weights(
        model, lambda w: w.update({name: weight.half() for name, weight in w.items() if "embed" not in name})
    )
    return "and its like are F16 and F32; use one"


def garble_index(model):
    (model / "model.safetensors.index.json").write_text("[]")
    return "not an index of weights"


def index_outside(model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    return "which is no file of this folder"


def no_weights(model):
    for shard in [*shards(model), model / "model.safetensors.index.json"]:
        shard.unlink()
    return "has neither model.safetensors nor model.safetensors.index.json"


def only_pickles(model):
    no_weights(model)
    (model / "pytorch_model.bin").write_bytes(b"")
    return "save_pretrained"


def no_config(model):
    (model / "config.json").unlink()
    return "has no config.json"


def garble_config(model):
    (model / "config.json").write_text("{")
    return "not JSON"


def list_config(model):
    (model / "config.json").write_text("[]")
    return "not a JSON object"


DAMAGES = [
    lose_shard,
    cut_off,
    cut_off_header,
    empty,
    too_long,
    garble_header,
    wrong_offsets,
    fp8,
    lack_weight,
    extra_weight,
    another_dtype,
    garble_index,
    index_outside,
    no_weights,
    only_pickles,
    no_config,
    garble_config,
    list_config,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_folders(model, damage):
    reason = damage(model)
    assert reason in refusal(model)


def test_a_shard_cut_off_while_it_is_read(model, monkeypatch):
    """The file shrinks after its header was compared with its size: no checkpoint is left."""
    shard = shards(model)[-1]
    check = weight_source.refuse_mismatch

    def cut_off_then(*arguments):
        check(*arguments)
        shard.write_bytes(shard.read_bytes()[:-8])

    monkeypatch.setattr(weight_source, "refuse_mismatch", cut_off_then)
    assert "the file is cut off" in refusal(model)


@pytest.mark.parametrize("size", [30, 3000, 100_000])
def test_a_full_disk_leaves_nothing(model, capsys, size):
    command_line = ["--hf", str(model), "--save", str(model.parent / "checkpoint")]
    with largest_file(size):
        assert run_command(lambda: hf_to_mcore(command_line)) == 2
    assert "File too large" in capsys.readouterr().err
    assert [path.name for path in model.parent.iterdir()] == [model.name]


@pytest.mark.parametrize("size", [30, 3000, 100_000])
def test_a_full_disk_leaves_no_export(whole, tmp_path, capsys, size):
    command_line = ["--load", str(whole / "checkpoint"), "--hf", str(tmp_path / "back")]
    with largest_file(size):
        assert run_command(lambda: mcore_to_hf(command_line)) == 2
    assert "File too large" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device", "some file")])
def test_an_interrupted_export_leaves_nothing(whole, tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(ShardWriter, "finish", fail)
    with pytest.raises((KeyboardInterrupt, InputError)):
        mcore_to_hf(["--load", str(whole / "checkpoint"), "--hf", str(tmp_path / "back")])
    assert not list(tmp_path.iterdir())


def test_folders_with_content_are_not_touched(model, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        hf_to_mcore(["--hf", str(model), "--save", str(tmp_path / "checkpoint")])
    assert (tmp_path / "checkpoint" / "mine").read_text() == "x"


def test_no_folder_at_all(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        hf_to_mcore(["--hf", str(tmp_path / "nothing"), "--save", str(tmp_path / "checkpoint")])


def test_buffers_that_old_versions_stored_are_ignored(model):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(model, lambda weights: weights.update({name: torch.ones(8)}))
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = shards(model)[0].name
    index.write_text(json.dumps(content))
    hf_to_mcore(["--hf", str(model), "--save", str(model.parent / "checkpoint")])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.int64, torch.float64])
@pytest.mark.parametrize("in_shards", [False, True])
def test_masks_and_angles_of_published_gpt_neox_models_are_ignored(tmp_path, dtype, in_shards):
    """Pythia's files have them, in dtypes that weights do not have."""
    model, part = tmp_path / "hf", "gpt_neox.layers.1.attention."
    tiny_models.write_model("gpt-neox in turn tied", model)
    weights = load_file(model / "model.safetensors")
    masks = {part + "bias": torch.ones(1, 1, 8, 8), part + "masked_bias": torch.ones(())}
    masks |= {part + "rotary_emb.inv_freq": torch.ones(4), part + "rotary_emb.cos_cached": torch.ones(9, 4)}
    weights |= {name: buffer.to(dtype) for name, buffer in masks.items()}
    tiny_models.save_weights(weights, model / "model.safetensors")
    if in_shards:
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    hf_to_mcore(["--hf", str(model), "--save", str(tmp_path / "checkpoint")])
    mcore_to_hf(["--load", str(tmp_path / "checkpoint"), "--hf", str(tmp_path / "back")])
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == weights.keys() - masks.keys()


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (torch.int32, "weight is I32; only F32, BF16, F16 can be converted; if the model is quantised, take the one"),
        (
            torch.float64,
            "weight is F64; only F32, BF16, F16 can be converted; load the model with transformers",
        ),
    ],
)
def test_weights_of_other_dtypes(model, dtype, remedy):
    change_weights(model, lambda w: w.update({"model.embed_tokens.weight": torch.ones(131, 48, dtype=dtype)}))
    assert remedy in refusal(model)


def test_an_export_of_another_models_configuration_is_refused(whole, tmp_path):
    shutil.copytree(whole / "checkpoint", tmp_path / "checkpoint")
    kept = tmp_path / "checkpoint" / "huggingface"
    change_config(kept, rms_norm_eps=1e-5)
    command_line = ["--load", str(tmp_path / "checkpoint"), "--hf", str(tmp_path / "back")]
    with pytest.raises(InputError, match=r"norm_epsilon is 1e-05, the checkpoint has 0.001"):
        mcore_to_hf(command_line)
    (kept / "config.json").unlink()
    with pytest.raises(InputError, match=r"is gone; put the original's config.json there"):
        mcore_to_hf(command_line)


def test_a_writer_needs_every_weight_as_planned(tmp_path):
    planned = [PlannedWeight("a", torch.float32, (2, 3)), PlannedWeight("b", torch.float32, (2,))]
    writer = ShardWriter(tmp_path, planned, 10**9)
    with pytest.raises(ValueError, match="where"):
        writer.write("a", torch.zeros(3, 2))
    writer.close()
    writer = ShardWriter(tmp_path, planned, 10**9)
    writer.write("b", torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="never written: a"):
        writer.finish()
    writer.write("a", torch.arange(6.0).view(2, 3))
    writer.finish()
    assert load_file(tmp_path / "model.safetensors")["b"].tolist() == [1, 2]
    assert WeightFiles(tmp_path).weights["a"].shape == (2, 3)

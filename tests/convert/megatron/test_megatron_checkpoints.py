"""Checkpoints that Megatron-LM writes: what they compute comes through, and whatever is wrong is refused in a line.

They are made here by Megatron-Core's own ``GPTModel`` and ``dist_checkpointing``, with what Megatron-LM's
``save_checkpoint`` puts beside the weights.
"""

import argparse
import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from mft_megatron.convert.commands.convert import main
from mft_megatron.convert.megatron.arguments import read_megatron_lm
from mft_megatron.convert.megatron.common_pt import read_args, read_common
from mft_megatron.convert.megatron.model_import import read_description
from mft_megatron.convert.megatron.weights import weights_of
from mft_megatron.errors import InputError
from tests.ranks import run_on_ranks
from tests.refusals import refused_call

pytestmark = pytest.mark.filterwarnings("ignore")  # of Megatron-Core
VOCABULARY, PADDED, TOKENS = 131, 256, 24
SHAPE = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "group_query_attention": False,
    "num_query_groups": 1,
    "max_position_embeddings": 64,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "swiglu": False,
    "squared_relu": False,
    "bias_gelu_fusion": False,
    "untie_embeddings_and_output_weights": False,
    "num_experts": None,
    "moe_layer_freq": 1,
    "multi_latent_attention": False,
    "spec": None,
    "padded_vocab_size": PADDED,
    "make_vocab_size_divisible_by": 128,
    "tensor_model_parallel_size": 2,
    "params_dtype": torch.float32,
    "save": Path("/somewhere/else"),
}
MODERN = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
}
# by name: what the arguments say besides, and whether each layer is stored under a name of its own
MODELS = {
    "llama": (
        {
            **MODERN,
            "group_query_attention": True,
            "num_query_groups": 2,
            "qk_layernorm": True,
            "use_rope_scaling": True,
            "rotary_base": 500000,
            "kv_channels": 16,
            "vocab_size": VOCABULARY,
        },
        False,
    ),
    "gpt": ({"squared_relu": True}, False),
    "layer by layer": ({**MODERN, "window_size": (5, 0), "add_qkv_bias": True}, True),
    "experts": (
        {
            **MODERN,
            "num_experts": 4,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 40,
            "moe_shared_expert_intermediate_size": 24,
            "moe_layer_freq": [0, 1, 1],
        },
        True,
    ),
}


def some_tokens():
    return torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(3))


def _save(folder, names, tensor_parallel_size):
    """Write checkpoints as Megatron-LM would, and beside each the model's logits of :func:`some_tokens`."""
    from types import SimpleNamespace

    from mft_megatron.mcore.parallel import process_groups

    sizes = {
        "tensor_model_parallel_size": tensor_parallel_size,
        "pipeline_model_parallel_size": 1,
        "num_virtual_stages_per_pipeline_rank": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "num_distributed_optimizer_instances": 1,
        "distributed_timeout_minutes": 5,
        "distributed_backend": "gloo",
    }
    with process_groups.process_groups(SimpleNamespace(**sizes), seed=1), torch.no_grad():
        for name in names:
            _save_one(Path(folder) / name.replace(" ", "_"), *MODELS[name], tensor_parallel_size)


def _model(a, tensor_parallel_size=1):
    """Megatron-Core's own model for these arguments."""
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        **{name: a[name] for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
        **{name: a[name] for name in ("kv_channels", "normalization", "layernorm_epsilon", "add_bias_linear")},
        **{name: a[name] for name in ("add_qkv_bias", "qk_layernorm")},
        **{name: value for name, value in a.items() if name.startswith("moe_")},
        num_query_groups=a["num_query_groups"] if a["group_query_attention"] else None,
        num_moe_experts=a["num_experts"],
        gated_linear_unit=a["swiglu"],
        activation_func=torch.nn.functional.silu if a["swiglu"] else squared_relu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        attention_backend=AttnBackend.local,  # the engine sets the same variables of the environment
        tensor_model_parallel_size=tensor_parallel_size,
    )
    if a["num_experts"]:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=a["normalization"])
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=a["qk_layernorm"], normalization=a["normalization"])
    return GPTModel(
        config,
        spec,
        vocab_size=PADDED,
        max_sequence_length=a["max_position_embeddings"],
        share_embeddings_and_output_weights=not a["untie_embeddings_and_output_weights"],
        position_embedding_type=a["position_embedding_type"],
        rotary_percent=a["rotary_percent"],
        rotary_base=a["rotary_base"],
        rope_scaling=a["use_rope_scaling"],
    ).eval()


def _logits_of_megatron(model, a):
    """[S, V], of :func:`some_tokens`."""
    from megatron.core import tensor_parallel

    unseen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    if "window_size" in a:
        unseen |= torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-a["window_size"][0] - 1)
    logits = model(some_tokens(), torch.arange(TOKENS)[None], unseen[None, None])
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits)[0, :, :VOCABULARY]


def _save_one(folder, changes, by_layer, tensor_parallel_size):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.transformer.enums import AttnBackend

    a = {**SHAPE, **changes}
    model = _model(a, tensor_parallel_size)
    rank = torch.distributed.get_rank()
    for number, (name, weight) in enumerate(model.named_parameters()):
        split = getattr(weight, "tensor_model_parallel", False)
        generator = torch.Generator().manual_seed(100 * number + (rank if split else 50))
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    logits = _logits_of_megatron(model, a)
    path = folder / "iter_0000007"
    if rank == 0:
        path.mkdir(parents=True)
        torch.save(logits, folder / "logits.pt")
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()
    weights = model.sharded_state_dict(metadata={"non_homogeneous_layers": by_layer})
    where = "decoder.layers.0." if by_layer else "decoder.layers."
    extra = ShardedObject(f"{where}self_attention.core_attention._extra_state", None, (1,), (0,), replica_id=rank)
    moment = ShardedTensor.from_rank_offsets(
        "optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.zeros(4), replica_id=rank
    )
    state = {
        "args": argparse.Namespace(**a, attention_backend=AttnBackend.auto),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": {**weights, "layer._extra_state": extra},
        "optimizer": {"state": moment, "param_groups": [{"lr": 1e-4, "step": torch.tensor(7)}]},
        "opt_param_scheduler": {"max_lr": 1e-4},
        "num_floating_point_operations_so_far": 1e9,
    }
    dist_checkpointing.save(state, str(path))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    run_on_ranks(2, _save, str(folder), ["llama"], 2)
    run_on_ranks(1, _save, str(folder), [name for name in MODELS if name != "llama"], 1)
    return folder


def convert(source, target, *words):
    main(["megatron-to-mcore", "--load", str(source), "--save", str(target), *map(str, words)])
    return target


@pytest.fixture(scope="module")
def converted(checkpoints):
    words = ("--vocab-size", VOCABULARY)
    return {
        name: convert(
            checkpoints / name.replace(" ", "_"),
            checkpoints / f"converted {name}",
            *(() if name == "llama" else words),
        )
        for name in MODELS
    }


def _loaded(folders):
    """By name: the engine's logits and shapes of its weights, and the logits of Megatron's own model, both with the
    converted checkpoint."""
    from megatron.core import dist_checkpointing

    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.checkpointing.weight_source import CheckpointSource
    from mft_megatron.mcore.inference import logits_of, model_of
    from mft_megatron.mcore.parallel.sharded_weights import shards_of

    found = {}
    for name, folder in folders.items():
        words = f"--data-path none --seq-length {TOKENS} --micro-batch-size 1 --train-iters 1 --lr 1 --hidden-dropout 0"
        words += " --attention-dropout 0 --make-vocab-size-divisible-by 1 --load"
        arguments = parse_arguments([*words.split(), folder])
        path, info = arguments.resume.path, arguments.resume.info
        with model_of(arguments, info.vocab_size, CheckpointSource(path, info)) as model:
            ours = logits_of(model, some_tokens()[0].tolist())
            shapes = {shard.key: tuple(shard.global_shape) for shard in shards_of(model)}
            theirs = _model({**SHAPE, **MODELS[name][0]})
            for layer in (layer for layer in theirs.decoder.layers if hasattr(layer.mlp, "router")):
                # local layers would look for the norm before experts by a name that Transformer Engine's have not
                layer.submodules_config.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
            state = {"model": theirs.sharded_state_dict()}
            # the extra states that local layers ask for are not there
            loaded = dist_checkpointing.load(state, path, strict="log_all")
            theirs.load_state_dict(loaded["model"], strict=False)
            found[name] = ours, shapes, _logits_of_megatron(theirs, {**SHAPE, **MODELS[name][0]})
    return found


@pytest.fixture(scope="module")
def loaded(converted):
    return run_on_ranks(1, _loaded, {name: str(folder) for name, folder in converted.items()})[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_megatrons_own_model(checkpoints, loaded, name):
    expected = torch.load(checkpoints / name.replace(" ", "_") / "logits.pt")
    ours, _, with_ours = loaded[name]
    assert expected.std() > 0.3
    assert (ours - expected).abs().max() < 2e-5
    assert (with_ours - expected).abs().max() < 2e-5  # and back: Megatron-Core loads what was converted


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_has_the_weights_that_the_table_lists(loaded, name):
    network = read_megatron_lm({**SHAPE, **MODELS[name][0]})
    assert {one.name: (*one.stack, *one.shape) for one in weights_of(network, VOCABULARY)} == loaded[name][1]


def test_it_goes_on_to_hugging_face(converted, tmp_path):
    main(["mcore-to-hf", "--load", str(converted["layer by layer"]), "--hf", str(tmp_path / "hf")])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["sliding_window"]) == ("qwen2", VOCABULARY, 6)


def refusal(source, *words):
    line = refused_call(convert, source, source.parent / "refused", *words)
    assert not list(source.parent.glob("*refused*"))
    return line


def changed(checkpoints, tmp_path, name="llama", **changes):
    """A copy of a checkpoint whose arguments say something else."""
    shutil.copytree(checkpoints / name, tmp_path / name)
    content = {**SHAPE, **MODELS[name][0], **changes}
    state = {"args": argparse.Namespace(**{key: value for key, value in content.items() if value != "absent"})}
    torch.save(state, tmp_path / name / "iter_0000007" / "common.pt")
    return tmp_path / name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": "absent"}, "has 256 rows of vocabulary, padding counted in, .* give --vocab-size N, or --hf"),
        ({"vocab_size": 257}, "has 256 rows of vocabulary, not the 257"),
        ({"num_layers": 2}, r"_(weight|bias) has the shape \[3, 32\], its description says \[2, 32\]"),
        (
            {"ffn_hidden_size": 64},
            r"linear_fc1.weight has the shape \[3, 96, 32\], its description says \[3, 128, 32\]",
        ),
        ({"qk_layernorm": False}, "k_layernorm.weight, .*q_layernorm.weight not known in this architecture"),
        ({"add_qkv_bias": True}, "has no decoder.layers.self_attention.linear_qkv.bias; it is not of the arch"),
        ({"num_query_groups": "absent", "group_query_attention": False}, r"\[3, 128, 32\], .* says \[3, 192, 32\]"),
        ({"mtp_num_layers": 1}, "mtp_num_layers is 1, which this program cannot express"),
        ({"softmax_type": "learnable"}, "softmax_type is 'learnable', which this program cannot express"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type is 'yarn'"),
        ({"rope_scaling_factor": 4.0}, "rope_scaling_factor is 4.0, which not every version"),
        ({"num_layers": "absent"}, "num_layers is None; the checkpoint does not say what model it is of"),
    ],
)
def test_what_it_says_and_what_it_holds_must_agree(checkpoints, tmp_path, changes, reason):
    assert re.search(reason, refusal(changed(checkpoints, tmp_path, **changes)))


def test_a_vocabulary_and_a_configuration_of_hugging_face(checkpoints, converted, tmp_path):
    hf = converted["layer by layer"] / "huggingface"
    source = checkpoints / "layer_by_layer"
    (hf / "tokenizer.json").write_text("of the model")
    info = json.loads((convert(source, tmp_path / "one", "--hf", hf) / "iter_0000000/mft_checkpoint.json").read_text())
    assert (info["vocab_size"], info["source"]) == (VOCABULARY, "Qwen2ForCausalLM")
    assert (tmp_path / "one" / "huggingface" / "tokenizer.json").read_text() == "of the model"
    shutil.copytree(checkpoints / "llama", tmp_path / "llama")
    assert "is another model" in refusal(tmp_path / "llama", "--hf", hf)


def test_which_checkpoint_is_taken(checkpoints, converted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(checkpoints / "llama", run)
    shutil.copytree(run / "iter_0000007", run / "release")
    assert "iter_0000009: no .metadata there, so it is no torch_dist" in refusal(run, "--ckpt-step", 9)
    for text, name in (("release", "release"), ("7", "iter_0000007")):
        (run / "latest_checkpointed_iteration.txt").write_text(text)
        (run / name / ".metadata").rename(run / "hidden")
        assert f"{name}: no .metadata there, so it is no torch_dist checkpoint; Meg" in refusal(run)
        (run / "hidden").rename(run / name / ".metadata")
    (run / "latest_checkpointed_iteration.txt").unlink()  # as Megatron-Bridge leaves it
    convert(run, tmp_path / "newest")
    convert(run / "release", tmp_path / "itself")
    shutil.copytree(converted["llama"], tmp_path / "ours" / "run")
    assert "is a checkpoint of this program" in refusal(tmp_path / "ours" / "run")


class _Trap:
    """What stands in a file of somebody who means harm."""

    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return Path.touch, (self._file,)


def test_nothing_in_the_file_is_run(checkpoints, tmp_path):
    run, sprung = checkpoints / "llama", tmp_path / "sprung"
    with zipfile.ZipFile(tmp_path / "common.pt", "w") as archive:
        archive.writestr("common/data.pkl", pickle.dumps({"args": _Trap(sprung), "iteration": 3}))
    with zipfile.ZipFile(tmp_path / "common.pt") as archive:
        pickle.loads(archive.read("common/data.pkl"))
    assert sprung.exists()  # it is one
    sprung.unlink()
    common = read_common(tmp_path)
    assert (common["iteration"], read_args(common)) == (3, None)
    assert not sprung.exists()
    args = read_args(read_common(run / "iter_0000007"))
    assert (args["hidden_size"], args["save"].name) == (32, "pathlib.PosixPath")
    (tmp_path / "common.pt").write_bytes(b"PK and then nothing")
    with pytest.raises(InputError, match=r"cannot be read .* the checkpoint is damaged"):
        read_common(tmp_path)


# what Megatron-Bridge writes of such a model, where names or values differ from Megatron-LM's
BRIDGE = {
    "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "gated_linear_unit": True,
    "num_moe_experts": None,
    "num_query_groups": 2,
    "seq_length": 64,
    "share_embeddings_and_output_weights": False,
    "rope_scaling": True,
    "rope_scaling_factor": 8.0,
    "params_dtype": {"_target_": "torch.float32", "_call_": False},
    "vocab_size": VOCABULARY,
}


def bridge(folder, **changes):
    """A checkpoint folder of Megatron-Bridge's, as far as its description goes."""
    own = {**SHAPE, **MODELS["llama"][0]}
    absent = ("swiglu", "squared_relu", "group_query_attention", "num_experts", "use_rope_scaling", "save")
    absent += ("max_position_embeddings", "untie_embeddings_and_output_weights", "bias_gelu_fusion", "params_dtype")
    model = {**{name: value for name, value in own.items() if name not in absent}, **BRIDGE, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": model, "train": {"train_iters": 5}}))
    torch.save({"checkpoint_version": 3.0, "iteration": 7}, folder / "common.pt")
    return folder


def test_megatron_bridge_says_the_same(tmp_path):
    expected = read_megatron_lm({**SHAPE, **MODELS["llama"][0]})
    assert read_description(bridge(tmp_path)) == (expected, VOCABULARY)
    assert read_description(bridge(tmp_path, seq_len_interpolation_factor=None, vocab_size=None)) == (expected, None)
    scaled = read_description(bridge(tmp_path, rope_scaling_factor=32.0))[0]
    assert scaled.scaling.factor == 32


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"_target_": "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider"},
            "'GemmaModelProvider' may com",
        ),
        ({"_target_": "a.Qwen3NextModelProvider"}, "'Qwen3NextModelProvider' may compute"),
        ({"_target_": "a.OtherGPTModelProvider"}, "'OtherGPTModelProvider' may compute"),
        ({"gated_linear_unit": False}, "activation_func 'torch.nn.functional.silu' without a gate"),
        ({"num_layers": None}, "num_layers is None"),
    ],
)
def test_what_megatron_bridge_says_is_refused(tmp_path, changes, reason):
    with pytest.raises(InputError, match=reason):
        read_description(bridge(tmp_path, **changes))
    (tmp_path / "run_config.yaml").unlink()
    with pytest.raises(InputError, match=r"neither args in common.pt nor run_config.yaml"):
        read_description(tmp_path)


@pytest.mark.parametrize(
    ("said", "field", "value"),
    [
        ({"bias_gelu_fusion": True}, "openai_gelu", True),  # Megatron's fused GELU is the approximation
        ({}, "openai_gelu", False),
        ({"bias_gelu_fusion": True, "swiglu": True}, "openai_gelu", False),
        ({"bias_gelu_fusion": True, "add_bias_linear": False}, "openai_gelu", False),
        ({"disable_bias_linear": True}, "add_bias_linear", False),
        ({"layernorm_zero_centered_gamma": True}, "apply_layernorm_1p", True),
        ({"layernorm_epsilon": 1e-6}, "norm_epsilon", 1e-6),
        ({"group_query_attention": True, "num_query_groups": 4}, "group_query_attention", False),
        ({"use_rotary_position_embeddings": True}, "position_embedding_type", "rope"),
        ({"window_size": (7, 0), "window_attn_skip_freq": [1, 0, 1]}, "window_attn_skip_freq", "[1,0,1]"),
        ({"num_experts": 2, "moe_layer_freq": [1, 1, 1]}, "moe_layer_freq", 1),
        ({"num_experts": 2}, "moe_ffn_hidden_size", 48),
        ({"moe_router_topk": 3}, "moe_router_topk", 2),  # of no account without experts
    ],
)
def test_what_arguments_mean(said, field, value):
    assert getattr(read_megatron_lm({**SHAPE, **said}), field) == value

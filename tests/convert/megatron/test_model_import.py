"""Import of Megatron-LM's checkpoints: logits are unchanged, and every mismatch is refused in one line.

Megatron-Core's own ``GPTModel`` and ``dist_checkpointing`` write them here, with everything that Megatron-LM's
``save_checkpoint`` stores besides weights.
"""

import argparse
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from mft_megatron.convert.commands.convert import main
from mft_megatron.convert.megatron.arguments import read_megatron_lm
from mft_megatron.convert.megatron.weights import weights_of
from mft_megatron.run_folder.description import read_info
from tests.convert.megatron_models import MODELS, PADDED, SHAPE, VOCABULARY, args_of, move_to_object
from tests.ranks import run_on_ranks
from tests.refusals import refused_call

pytestmark = pytest.mark.filterwarnings("ignore")  # of Megatron-Core
TOKENS = 24


def some_tokens():
    """Token ids, int64 [1, TOKENS]."""
    return torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(3))


def _save(folder, names, tensor_parallel_size):
    """Write checkpoints as Megatron-LM does, each with the model's logits of :func:`some_tokens`."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups

    filesystem_async._results_queue = None  # saves of this project need none
    layout = DistributedArguments(tensor_model_parallel_size=tensor_parallel_size)
    with process_groups.process_groups(layout, seed=1), torch.no_grad():
        for name in names:
            _save_one(Path(folder) / name.replace(" ", "_"), *MODELS[name], tensor_parallel_size)


def _model(a, tensor_parallel_size=1):
    """Megatron-Core's own model with the arguments ``a``."""
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
    """Logits of :func:`some_tokens`, fp32 [S, V]."""
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
    """Load converted checkpoints into the engine and into Megatron's own model.

    Returns:
        by name: the engine's logits and the shapes of its weights, and the logits of Megatron's model.
    """
    from megatron.core import dist_checkpointing

    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.checkpointing.weight_source import CheckpointSource
    from mft_megatron.mcore.inference import logits_of, model_of
    from mft_megatron.mcore.parallel.sharded_weights import shards_of

    results = {}
    for name, folder in folders.items():
        words = f"--data-path none --seq-length {TOKENS} --micro-batch-size 1 --train-iters 1 --lr 1 --hidden-dropout 0"
        words += " --attention-dropout 0 --make-vocab-size-divisible-by 1 --load"
        arguments = parse_arguments([*words.split(), folder])
        path, info = arguments.resume.path, arguments.resume.info
        with model_of(arguments, info.vocab_size, CheckpointSource(path, info)) as model:
            ours = logits_of(model, some_tokens()[0].tolist())
            shapes = {shard.key: tuple(shard.global_shape) for shard in shards_of(model)}
            theirs = _model(args_of(name))
            for layer in (layer for layer in theirs.decoder.layers if hasattr(layer.mlp, "router")):
                # local layers expect another name of the norm before experts than Transformer Engine's
                layer.submodules_config.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
            state = {"model": theirs.sharded_state_dict()}
            # local layers expect extra states that are not stored
            loaded = dist_checkpointing.load(state, path, strict="log_all")
            theirs.load_state_dict(loaded["model"], strict=False)
            results[name] = ours, shapes, _logits_of_megatron(theirs, args_of(name))
    return results


@pytest.fixture(scope="module")
def loaded(converted):
    return run_on_ranks(1, _loaded, {name: str(folder) for name, folder in converted.items()})[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_megatrons_own_model(checkpoints, loaded, name):
    expected = torch.load(checkpoints / name.replace(" ", "_") / "logits.pt")
    ours, _, with_ours = loaded[name]
    assert expected.std() > 0.3
    assert (ours - expected).abs().max() < 2e-5
    assert (with_ours - expected).abs().max() < 2e-5  # Megatron-Core loads the converted checkpoint


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_has_the_weights_that_the_table_lists(loaded, name):
    network = read_megatron_lm(args_of(name))
    assert {weight.name: (*weight.stack, *weight.shape) for weight in weights_of(network, VOCABULARY)} == loaded[name][
        1
    ]


def test_export_to_hugging_face(converted, tmp_path):
    main(["mcore-to-hf", "--load", str(converted["layer by layer"]), "--hf", str(tmp_path / "hf")])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["sliding_window"]) == ("qwen2", VOCABULARY, 6)


def test_the_common_state_may_be_an_object(checkpoints, converted, tmp_path):
    """Megatron-Core stores it so from 0.19; the other form converts to the same bytes."""
    shutil.copytree(checkpoints / "llama", tmp_path / "llama")
    path = tmp_path / "llama" / "iter_0000007"
    if (path / "common.pt").is_file():
        move_to_object(path)
    else:
        torch.save({"args": argparse.Namespace(**args_of("llama"))}, path / "common.pt")
    target = convert(tmp_path / "llama", tmp_path / "target")
    one, other = target / "iter_0000000", converted["llama"] / "iter_0000000"
    files = sorted(file.name for file in one.glob("*.distcp"))
    assert files
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    # the index is a pickle, which may spell the same content in two ways
    without_index = [dataclasses.replace(read_info(path), manifest="") for path in (one, other)]
    assert without_index[0] == without_index[1]


def refusal(source, *words):
    line = refused_call(convert, source, source.parent / "refused", *words)
    assert not list(source.parent.glob("*refused*"))
    return line


def changed(checkpoints, tmp_path, name="llama", **changes):
    """Copy a checkpoint and change its arguments."""
    shutil.copytree(checkpoints / name, tmp_path / name)
    content = args_of(name, **changes)
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
def test_arguments_and_weights_must_agree(checkpoints, tmp_path, changes, reason):
    assert re.search(reason, refusal(changed(checkpoints, tmp_path, **changes)))


def test_vocabulary_and_configuration_of_a_hugging_face_folder(checkpoints, converted, tmp_path, capsys):
    hf = converted["layer by layer"] / "huggingface"
    source = checkpoints / "layer_by_layer"
    (hf / "tokenizer.json").write_text("of the model")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "made_up": 1}))
    info = json.loads((convert(source, tmp_path / "one", "--hf", hf) / "iter_0000000/mft_checkpoint.json").read_text())
    assert (info["vocab_size"], info["source"]) == (VOCABULARY, "Qwen2ForCausalLM")
    assert f"note: {hf}/config.json: made_up: not read, because transformers' Qwen2Config" in capsys.readouterr().out
    assert (tmp_path / "one" / "huggingface" / "tokenizer.json").read_text() == "of the model"
    shutil.copytree(checkpoints / "llama", tmp_path / "llama")
    assert "is another model" in refusal(tmp_path / "llama", "--hf", hf)


def test_the_choice_of_a_checkpoint(checkpoints, converted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(checkpoints / "llama", run)
    shutil.copytree(run / "iter_0000007", run / "release")
    assert "iter_0000009: no .metadata there, so it is no torch_dist" in refusal(run, "--ckpt-step", 9)
    for text, name in (("release", "release"), ("7", "iter_0000007")):
        (run / "latest_checkpointed_iteration.txt").write_text(text)
        (run / name / ".metadata").rename(run / "hidden")
        assert f"{name}: no .metadata there, so it is no torch_dist checkpoint; Meg" in refusal(run)
        (run / "hidden").rename(run / name / ".metadata")
    (run / "latest_checkpointed_iteration.txt").unlink()  # as in a folder of Megatron-Bridge
    convert(run, tmp_path / "newest")
    convert(run / "release", tmp_path / "itself")
    shutil.copytree(converted["llama"], tmp_path / "ours" / "run")
    assert "is a checkpoint of this program" in refusal(tmp_path / "ours" / "run")

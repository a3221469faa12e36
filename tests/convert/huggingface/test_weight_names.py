"""Weights under names that wrappers gave them: read where that is certain, otherwise the cause is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mft_megatron.convert.commands.check import check
from mft_megatron.convert.commands.huggingface import hf_to_mcore, mcore_to_hf
from mft_megatron.convert.huggingface import safetensors_reader
from mft_megatron.convert.huggingface.families.table import FAMILIES
from mft_megatron.convert.huggingface.mapped_weight import names_of
from mft_megatron.convert.huggingface.weight_names import find_renaming, has_adapters
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing import tensor_writer
from tests.convert import tiny_models
from tests.ranks import run_on_ranks
from tests.refusals import refused_call

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers


def within(part):
    """Put a part into names as a wrapper around each layer does."""

    def change(name):
        head, layers, rest = name.partition("layers.0.")
        return f"{head}{layers}{part}.{rest}" if layers else name

    return change


# change of a name, and words of the cause; base models lack one part of the names
CHANGES = {
    "DDP": (lambda name: f"module.{name}", "DistributedDataParallel"),
    "torch.compile": (lambda name: f"_orig_mod.{name}", "torch.compile"),
    "DDP of torch.compile": (lambda name: f"module._orig_mod.{name}", "DistributedDataParallel and torch.compile"),
    "PEFT": (lambda name: f"base_model.model.{name}", "PEFT"),
    "PEFT twice, in DDP": (lambda name: f"module.base_model.model.base_model.model.{name}", "DataParallel and PEFT"),
    "compiled layers": (within("_orig_mod"), "torch.compile"),
    "FSDP": (lambda name: f"_fsdp_wrapped_module.{within('_checkpoint_wrapped_module')(name)}", "FSDP"),
    "a module of the user's": (lambda name: f"policy.actor.{name}", "is stored as policy.actor."),
    "doubled": (lambda name: f"model.{name}", "is stored as model."),
}


def names_of_model(family, tied):
    from mft_megatron.arguments.groups.network import NetworkArguments

    shape = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "kv_channels": 4}
    mapped = family.weights(NetworkArguments(**shape, num_query_groups=2, num_experts=2, tie_embeddings=tied))
    return names_of(mapped, NetworkArguments(**shape, num_experts=2)), mapped[0].hf_names[0]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_names_are_found(family, change):
    rename, words = CHANGES[change]
    for tied in (True, False):
        expected, anchor = names_of_model(FAMILIES[family], tied)
        stored = {rename(name): name for name in expected}
        renaming = find_renaming(stored, expected, anchor)
        assert renaming.names == stored
        assert words in renaming.cause
        example = rename(anchor) if rename(anchor) != anchor else min(stored.keys() - expected)
        assert f"{stored[example]} is stored as {example}" in renaming.cause


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_is_found_and_other_names_are_not(family):
    expected, anchor = names_of_model(FAMILIES[family], tied=True)
    part = anchor.partition(".")[0] + "."
    stored = {name.removeprefix(part): name for name in expected}
    assert find_renaming(stored, expected, anchor).names == stored
    assert find_renaming(expected, expected, anchor) is None
    assert find_renaming({name.replace(".weight", ".w") for name in expected}, expected, anchor) is None
    # two weights would get one name
    assert find_renaming({*stored, *(f"module.{name}" for name in stored)}, expected, anchor) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("names")
    tiny_models.write_model("llama", root / "hf")
    hf_to_mcore(["--hf", str(root / "hf"), "--save", str(root / "checkpoint")])
    return root


@pytest.fixture
def model(whole, tmp_path):
    return shutil.copytree(whole / "hf", tmp_path / "hf")


def change_names(model, change):
    weights = load_file(model / "model.safetensors")
    tiny_models.save_weights({change(name): weight for name, weight in weights.items()}, model / "model.safetensors")


def refusal(model):
    return refused_call(hf_to_mcore, ["--hf", str(model), "--save", str(model.parent / "checkpoint")])


@pytest.mark.parametrize("change", ["DDP of torch.compile", "PEFT", "compiled layers", "doubled"])
def test_renamed_weights_are_read_and_exported_with_the_usual_names(model, whole, tmp_path, change, capsys):
    rename, words = CHANGES[change]
    change_names(model, rename)
    hf_to_mcore(["--hf", str(model), "--save", str(tmp_path / "checkpoint")])
    assert words in capsys.readouterr().out.partition("note: ")[2]
    mcore_to_hf(["--load", str(tmp_path / "checkpoint"), "--hf", str(tmp_path / "back")])
    expected, weights = (
        load_file(whole / "hf" / "model.safetensors"),
        load_file(tmp_path / "back" / "model.safetensors"),
    )
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in weights)


def test_a_server_does_not_find_renamed_weights(model, capsys):
    change_names(model, CHANGES["PEFT"][0])
    with pytest.raises((InputError, SystemExit)):
        check(["--hf", str(model)])
    assert "as PEFT names it, and so are all others, where servers do not find them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("self_attn.q_proj.lora_A.default.weight", True),
        ("self_attn.q_proj.lora_B.weight", True),
        ("embed_tokens.lora_embedding_A", True),
        ("self_attn.q_proj.lora_magnitude_vector", True),
        ("self_attn.q_proj.base_layer.weight", True),
        ("lm_head.modules_to_save.default.weight", True),
        ("self_attn.q_proj.weight", False),
    ],
)
def test_each_kind_of_an_adapter_s_weights_is_known(part, found):
    assert has_adapters(["model.norm.weight", f"base_model.model.model.layers.0.{part}"]) == found


def drop(*parts):
    return lambda weights: {name: w for name, w in weights.items() if not any(part in name for part in parts)}


def more(*names):
    return lambda weights: {**weights, **{name: torch.zeros(3) for name in names}}


def with_adapters(weights):
    renamed = {f"base_model.model.{name.replace('q_proj.', 'q_proj.base_layer.')}": w for name, w in weights.items()}
    return {**renamed, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 48)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_adapters, "holds adapters of PEFT beside the weights, which are not merged; save the model after merge"),
        (
            lambda weights: {f"module.{name}": w for name, w in drop("layers.1.mlp")(weights).items()},
            "as DistributedDataParallel names it, and so are the others, but model.layers.1.mlp.down_proj.weight",
        ),
        (
            lambda weights: {name.removeprefix("model."): w for name, w in drop("lm_head")(weights).items()},
            "model.embed_tokens.weight is stored as embed_tokens.weight, and so are the others, but lm_head.weight is",
        ),
        (more("v_head.summary.weight"), "v_head.summary.weight is of a head for another task, which would be lost"),
        (
            more("score.weight", "lm_tail.weight"),
            "lm_tail.weight, score.weight are not known in this architecture",
        ),
        (
            more("model.layers.0.mlp.up_proj.bias", "model.layers.1.self_attn.o_proj.bias"),
            "are stored, and config.json says that there are none; set attention_bias and mlp_bias to what the model",
        ),
        (
            more("model.layers.3.mlp.up_proj.weight", "model.layers.12.mlp.up_proj.weight"),
            "are stored, and config.json says num_hidden_layers 3; correct it",
        ),
        (
            more("model.layers.3.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.zeros"),
            "are not known in this architecture; the model is of another one",
        ),
        (drop("lm_head"), "lm_head.weight is missing; if the output layer is the embedding, set tie_word_embeddings"),
        (drop("layers.2."), "config.json says num_hidden_layers 3, and there are no weights of layer 2; correct it"),
        (drop("layers.1.", "layers.2."), "there are no weights of layer 1, 2; correct it, or download the missing"),
        (drop("layers.2.mlp"), "layers.2.mlp.up_proj.weight are missing, which config.json asks for; correct it, or"),
        (
            lambda weights: {name.upper(): w for name, w in weights.items()},
            "27 more are missing, which config.json",
        ),
    ],
)
def test_the_usual_causes_of_missing_weights_are_named(model, change, reason):
    weights = change(load_file(model / "model.safetensors"))
    tiny_models.save_weights(weights, model / "model.safetensors")
    assert reason in refusal(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named(model, value, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    weights = {name: weight.to(dtype) for name, weight in load_file(model / "model.safetensors").items()}
    weights[name][79, 47] = value
    tiny_models.save_weights(weights, model / "model.safetensors")
    line = refusal(model)
    assert f"hf/model.safetensors: {name} has {'NaN' if value != value else 'an infinity'} in it" in line


def test_a_rank_that_reads_some_columns_finds_them_too(model):
    from mft_megatron.convert.huggingface.safetensors_reader import WeightFiles

    name = "model.layers.1.mlp.down_proj.weight"
    weights = load_file(model / "model.safetensors")
    weights[name][5, 41] = float("nan")
    tiny_models.save_weights(weights, model / "model.safetensors")
    files = WeightFiles(model)
    files.read_block(torch.empty(48, 40), name, 0, 0)
    with pytest.raises(InputError, match=f"{name} has NaN"):
        files.read_block(torch.empty(48, 40), name, 0, 40)


def refusals_of_a_run(hf, layout, world_size):
    """The message with which each rank refuses the weights of a Hugging Face folder."""
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
    from mft_megatron.mcore.checkpointing.load_weights import fill_weights
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    source = HuggingFaceSource(hf)
    argv = tiny_models.argv_for(f"--hf-checkpoint {hf} {layout}")
    arguments = parse_arguments(argv, world_size, None, source.info)
    with process_groups.process_groups(arguments.distributed, seed=3):
        trainer = Trainer(arguments, source.info.vocab_size, 1)
        return refused_call(fill_weights, trainer, source)


@pytest.mark.parametrize("peft", ["none", "qlora"])
def test_all_ranks_say_the_same_of_what_one_reads(tmp_path, peft):
    """One rank of two has the row, and with 4 bits both compute together while they read."""
    model, name = tmp_path / "hf", "model.layers.1.mlp.down_proj.weight"
    tiny_models.write_model("llama", model, hidden_size=64, intermediate_size=128, num_attention_heads=8)
    weights = load_file(model / "model.safetensors")
    weights[name][5, 3] = float("nan")
    tiny_models.save_weights(weights, model / "model.safetensors")
    layout = f"--tensor-model-parallel-size 2 --peft-type {peft}"
    first, second = run_on_ranks(2, refusals_of_a_run, str(model), layout, 2)
    assert first == second
    assert f"{name} has NaN in it" in first


def test_a_checkpoint_that_is_not_finite_is_named(model, tmp_path, monkeypatch):
    """A run with a checkpoint that was written before its weights were checked, or by another program."""
    name = "model.layers.1.mlp.down_proj.weight"
    weights = load_file(model / "model.safetensors")
    weights[name][5, 41] = float("inf")
    tiny_models.save_weights(weights, model / "model.safetensors")
    monkeypatch.setattr(safetensors_reader, "refuse_non_finite", lambda *arguments: None)
    monkeypatch.setattr(tensor_writer, "refuse_to_write", lambda *arguments: None)
    hf_to_mcore(["--hf", str(model), "--save", str(tmp_path / "checkpoint")])
    one = {"one": (str(tmp_path / "checkpoint"), str(model))}
    with pytest.raises(pytest.fail.Exception, match=r"mlp.linear_fc2.weight \[1\] has an infinity in it"):
        run_on_ranks(1, tiny_models.logit_differences, "", 1, one)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4540516344\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_pointers_of_git_lfs_are_named(model, name):
    (model / name).write_text(POINTER)
    line = refusal(model)
    assert f"{name}: is a pointer of Git LFS, not the file itself; in its folder run 'git lfs install'" in line


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adapter_model.safetensors", "it is an adapter of PEFT, for --hf-adapter and merge-lora: give the model"),
        ("model-00001-of-00002.safetensors", "download model.safetensors.index.json"),
        ("consolidated.safetensors", "that is the format of its makers' own code"),
        ("consolidated.00.pth", "that is the format of its makers' own code"),
        ("tiny.Q4_K_M.gguf", "that is llama.cpp's format"),
        ("pytorch_model.bin", "load the model with transformers and write it again with save_pretrained"),
        ("README.md", "has neither model.safetensors nor model.safetensors.index.json; give the folder of a model"),
    ],
)
def test_other_formats_of_weights_are_named(model, name, reason):
    (model / "model.safetensors").rename(model / name)
    assert reason in refusal(model)


def test_a_folder_of_the_cache_and_a_name_on_the_hub(model, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "4d7a"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    assert f"as it is a folder of the hub's cache; give {snapshot}" in refusal(tmp_path / "models--a--b")
    monkeypatch.chdir(tmp_path)
    line = refused_call(hf_to_mcore, ["--hf", "org/name", "--save", "checkpoint"])
    assert "org/name: is no folder; to download it, run: hf download org/name --local-dir DIR" in line
    line = refused_call(hf_to_mcore, ["--hf", str(snapshot / "config.json"), "--save", "checkpoint"])
    assert line.endswith(f"config.json: is a file; give its folder, {snapshot}")
    line = refused_call(hf_to_mcore, ["--hf", "name", "--save", "checkpoint"])
    assert line.endswith("name: is no folder")
    assert json.loads((snapshot / "config.json").read_text())["model_type"] == "llama"
    # where --save and --save-hf wrote
    for name in ("latest_checkpointed_iteration.txt", "mft_checkpoint.json"):
        file = tmp_path / name[:6] / name
        file.parent.mkdir()
        file.touch()
        assert "as it holds checkpoints; export one with convert_checkpoint.py mcore-to-hf" in refusal(file.parent)
    for iteration in (8, 16):
        shutil.copytree(snapshot, tmp_path / "exports" / f"iter_{iteration:07}")
    assert f"holds the exports of a run; give one of them, such as {tmp_path}/exports/iter_0000016" in refusal(
        tmp_path / "exports"
    )

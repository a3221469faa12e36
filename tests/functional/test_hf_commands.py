"""Import from Hugging Face, training and export: the commands as a user runs them."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.descriptions import redescribe
from tests.ranks import run_tool, torchrun

RUN = (
    "--tensor-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --eval-iters 0 "
    "--attention-dropout 0 --hidden-dropout 0 --bf16"
).split()
UNREAD = "config.json: use_mrope: not read, because transformers' Qwen2Config has no such entry"


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_folder):
    """A Qwen2 with a vocabulary of 511; the tokenizer of the data set has 500 tokens."""
    from tests.convert import tiny_models

    folder = tmp_path_factory.mktemp("hf") / "model"
    sizes = {"vocab_size": 511, "max_position_embeddings": 256}
    tiny_models.write_model("qwen2 tied", folder, "bfloat16", tokenizer_folder, **sizes)
    return folder


@pytest.fixture(scope="module")
def checkpoint(model):
    process = run_tool("tools/convert_checkpoint.py", "hf-to-mcore", "--hf", model, "--save", model.parent / "start")
    assert process.returncode == 0, process.stderr
    assert "Qwen2, bf16, vocabulary of 511" in process.stdout
    assert process.stdout.count(UNREAD) == 1
    return model.parent / "start"


@pytest.mark.parametrize("start", ["--hf-checkpoint", pytest.param("--load", marks=pytest.mark.slow)])
def test_import_training_and_export_change_nothing(model, checkpoint, dataset_prefix, tmp_path, start):
    """Export every weight as it was imported: the learning rate is too small to change one in bf16.

    Of the other files only the chat format is what was trained. The first checkpoint is exported during the run and
    removed afterwards.
    """
    start_path = model if start == "--hf-checkpoint" else checkpoint
    command_line = (
        "--data-path",
        dataset_prefix,
        start,
        start_path,
        "--save",
        tmp_path / "run",
        "--save-hf",
        tmp_path / "exports",
    )
    if start == "--hf-checkpoint":
        command_line += tuple("--save-interval 1 --save-hf-interval 1 --save-retain-interval 2".split())
    process = torchrun(2, "pretrain_mft.py", *RUN, *command_line, "--lr", "1e-12")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(UNREAD) == (start == "--hf-checkpoint")  # by one rank; an import has said it already
    assert [path.name for path in (tmp_path / "run").glob("iter_*")] == ["iter_0000002"]
    info = json.loads((tmp_path / "run" / "iter_0000002" / "mft_checkpoint.json").read_text())
    assert (info["vocab_size"], info["source"], info["iteration"]) == (511, "Qwen2ForCausalLM", 2)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["event"], first["finetune"]) == ("load", True)
    command_line = ("mcore-to-hf", "--load", tmp_path / "run", "--hf", tmp_path / "hf")
    if start == "--load":
        process = run_tool("tools/convert_checkpoint.py", *command_line)
        assert process.returncode == 0, process.stderr
    else:
        (tmp_path / "exports" / "iter_0000002").rename(tmp_path / "hf")
    exports = [tmp_path / "hf", *(tmp_path / "exports").glob("*")]
    assert len(exports) == 2
    before, names = load_file(model / "model.safetensors"), {path.name for path in model.iterdir()}
    for folder in exports:
        after = load_file(folder / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(before[name].equal(after[name]) for name in before)
        assert {path.name for path in folder.iterdir()} == {*names, "chat_template.jinja"}
        for name in names - {"model.safetensors", "generation_config.json"}:
            assert (model / name).read_bytes() == (folder / name).read_bytes(), name
        ledger = json.loads(Path(f"{dataset_prefix}_dataset.json").read_text())
        assert (folder / "chat_template.jinja").read_text() == ledger["chat_template"]["sources"][0]["source"]
        assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 3, 0]}
    assert process.stdout.count("note: generation_config.json stops at 0, too") == 1  # once for both


def test_a_data_set_that_needs_more_tokens_is_refused(checkpoint, dataset_prefix, tmp_path):
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.data.loading.dataset import PackedDataset
    from mft_megatron.errors import InputError
    from mft_megatron.training.saving.data_order import refuse_other_data

    small = tmp_path / "small"
    shutil.copytree(checkpoint, small)
    file = small / "iter_0000000" / "mft_checkpoint.json"
    redescribe(file, vocab_size=499)
    command_line = [*RUN[2:], "--data-path", str(dataset_prefix), "--lr", "1e-3", "--load"]
    dataset = PackedDataset.open(str(dataset_prefix), 128)
    with pytest.raises(InputError, match=r"vocabulary of 499, .* has 500; preprocess the data with the model's token"):
        refuse_other_data(parse_arguments([*command_line, str(small)], 1, lambda prefix: [128]), dataset)
    refuse_other_data(parse_arguments([*command_line, str(checkpoint)], 1, lambda prefix: [128]), dataset)


@pytest.mark.parametrize("start", ["--hf-checkpoint", "--load"])
def test_a_data_set_of_another_tokenizer_is_refused(model, checkpoint, dataset_prefix, tmp_path, start):
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
    from mft_megatron.errors import InputError
    from mft_megatron.training.pretrain import pretrain

    start_path = shutil.copytree(model if start == "--hf-checkpoint" else checkpoint, tmp_path / "start")
    (file,) = start_path.glob("tokenizer.json" if start == "--hf-checkpoint" else "huggingface/tokenizer.json")
    content = json.loads(file.read_text())
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    command_line = [*RUN[2:], "--data-path", str(dataset_prefix), "--lr", "1e-3", start, str(start_path)]
    info = HuggingFaceSource(str(start_path)).info if start == "--hf-checkpoint" else None
    arguments = parse_arguments(command_line, 1, lambda prefix: [128], info)
    with pytest.raises(InputError, match=r"the model's tokenizer is another one than .* was made with: "):
        pretrain(arguments)


def test_more_ranks_than_groups_are_refused(checkpoint, dataset_prefix):
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.errors import InputError

    command_line = [*RUN, "--data-path", str(dataset_prefix), "--lr", "1e-3", "--load", str(checkpoint)]
    command_line[1] = "4"
    with pytest.raises(InputError, match="4 does not divide --num-query-groups 2; use a divisor"):
        parse_arguments(command_line, 4, lambda prefix: [128])


def test_another_tokenizer_of_the_run_replaces_that_of_the_model(checkpoint, tokenizer_folder, tmp_path):
    from mft_megatron.convert.commands.huggingface import mcore_to_hf

    run = tmp_path / "run"
    shutil.copytree(checkpoint, run)
    (run / "huggingface" / "tokenizer.model").write_text("of the model")
    shutil.copytree(tokenizer_folder, run / "tokenizer")
    mcore_to_hf(["--load", str(run), "--hf", str(tmp_path / "same")])
    assert (tmp_path / "same" / "tokenizer.model").read_text() == "of the model"
    (run / "tokenizer" / "tokenizer.json").write_text("another")
    mcore_to_hf(["--load", str(run), "--hf", str(tmp_path / "other")])
    assert (tmp_path / "other" / "tokenizer.json").read_text() == "another"
    assert not (tmp_path / "other" / "tokenizer.model").exists()
    assert (tmp_path / "other" / "LICENSE").exists()


def test_a_converted_checkpoint_starts_a_run_and_does_not_resume_one(checkpoint, dataset_prefix):
    from mft_megatron.arguments.command import parse_arguments

    command_line = [*RUN, "--data-path", str(dataset_prefix), "--lr", "1e-3", "--load", str(checkpoint), "--seed", "7"]
    arguments = parse_arguments(command_line, 2, lambda prefix: [128])
    assert arguments.weights_alone
    assert arguments.initialization.seed == 7
    assert (arguments.network.add_qkv_bias, arguments.network.max_position_embeddings) == (True, 256)
    assert arguments.resume.path.name == "iter_0000000"


def test_a_model_that_cannot_be_exported_is_refused_before_the_run():
    from mft_megatron.arguments.groups.network import NetworkArguments
    from mft_megatron.convert.huggingface.model_export import refuse_export
    from mft_megatron.errors import InputError

    odd = NetworkArguments(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, kv_channels=4)
    with pytest.raises(InputError, match="--save-hf: no Hugging Face family fits this architecture"):
        refuse_export(odd, from_hugging_face=False)
    refuse_export(odd, from_hugging_face=True)


@pytest.mark.parametrize("blocked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_exports_during_a_run(checkpoint, dataset_prefix, tmp_path, blocked):
    """Remove a checkpoint only after its export; if that fails, keep it and end the run with an error."""
    from mft_megatron.convert.commands.huggingface import mcore_to_hf

    run, exports = tmp_path / "run", tmp_path / "exports"
    command_line = ("--data-path", dataset_prefix, "--load", checkpoint, "--save", run, "--save-hf", exports, *RUN[2:])
    command_line += tuple("--save-interval 1 --save-hf-interval 2 --save-retain-interval 3 --lr 1e-3".split())
    exports.mkdir()
    if blocked:
        (exports / "iter_0000002").write_text("not ours")
    process = torchrun(1, "pretrain_mft.py", *command_line, "--finetune", "--train-iters", "3")
    refusals = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    if blocked:
        assert process.returncode != 0
        assert len(refusals) == 1
        assert "iter_0000002 was not exported (--hf " in refusals[0]
        assert "exists already; remove it" in refusals[0]
        assert f"--load {run / 'iter_0000002'} --hf {exports / 'iter_0000002'} will do it" in refusals[0]
    else:
        assert process.returncode == 0, process.stderr
        early, late = (load_file(exports / f"iter_000000{n}" / "model.safetensors") for n in (2, 3))
        assert not early["model.norm.weight"].equal(late["model.norm.weight"])
        mcore_to_hf(["--load", str(run), "--hf", str(tmp_path / "by hand")])
        by_hand = load_file(tmp_path / "by hand" / "model.safetensors")
        assert by_hand.keys() == late.keys()
        assert all(by_hand[name].equal(late[name]) for name in late)
    remaining = {"iter_0000003"} | ({"iter_0000002"} if blocked else set())
    assert {path.name for path in run.glob("iter_*")} == remaining
    assert {path.name for path in exports.iterdir()} == {"iter_0000002", "iter_0000003"}

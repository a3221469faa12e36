"""Training of adapters by the command: saved alone or with the model, and resumed."""

import json
import shutil

import pytest

from tests.ranks import torchrun
from tests.run_records import records

RUN = (
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 4 --eval-iters 0 --attention-dropout 0 "
    "--hidden-dropout 0 --bf16 --lr 1e-3 --lr-decay-style constant --log-interval 1 --seed 3"
).split()
LORA = "--peft-type lora --lora-rank 4 --lora-dropout 0.1 --loraplus-lr-ratio 4 --save-interval 2".split()
TP2 = ("--tensor-model-parallel-size", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_folder):
    """A Llama of bf16 weights."""
    from tests.convert import tiny_models

    folder = tmp_path_factory.mktemp("lora") / "model"
    sizes = {"vocab_size": 500, "max_position_embeddings": 256}
    tiny_models.write_model("llama", folder, "bfloat16", tokenizer_folder, **sizes)
    return folder


@pytest.fixture(scope="module")
def run(model, dataset_prefix):
    """A run of four steps on two ranks, with checkpoints of the adapters alone after two and four."""
    folder = model.parent / "run"
    words = ("--data-path", dataset_prefix, "--hf-checkpoint", model, "--save", folder, "--load", folder)
    process = torchrun(2, "pretrain_mft.py", *RUN, *LORA, *TP2, "--save-adapters-only", *words)
    assert process.returncode == 0, process.stderr
    assert "of them trained: LoRA of rank 4, alpha 32, on linear_qkv, linear_proj" in process.stdout
    return folder


def _records(folder):
    """Steps that the run in ``folder`` logged."""
    return [{name: record[name] for name in ("step", "loss", "grad_norm", "lr")} for record in records(folder, "train")]


def test_only_adapters_are_saved(run):
    from mft_megatron.lora import is_adapter
    from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader

    info = json.loads((run / "iter_0000004" / "mft_checkpoint.json").read_text())
    assert (info["has_base"], info["peft_type"], info["lora"]["rank"]) == (False, "lora", 4)
    assert info["base"] == str(run.parent / "model")
    names = TensorReader(run / "iter_0000004").names()
    assert len(names) == 8
    assert all(is_adapter(name) for name in names)


def test_a_run_of_adapters_alone_resumes_bit_by_bit(run, model, dataset_prefix, tmp_path):
    """The command is repeated after an interruption; dropout is on."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2\n")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    words = ("--data-path", dataset_prefix, "--hf-checkpoint", model)
    folders = ("--save", tmp_path / "run", "--load", tmp_path / "run")
    process = torchrun(2, "pretrain_mft.py", *RUN, *LORA, *TP2, "--save-adapters-only", *words, *folders)
    assert process.returncode == 0, process.stderr
    assert _records(tmp_path / "run") == _records(run)[2:]


def test_adapters_without_their_model_are_refused(run, model, dataset_prefix, tmp_path):
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
    from mft_megatron.errors import InputError

    words = [*RUN, "--data-path", str(dataset_prefix), "--load", str(run), "--train-iters", "5"]
    with pytest.raises(InputError, match=r"it holds only adapters; give the model .* \(it was .*model\)"):
        parse_arguments(words, 1, lambda prefix: [128])
    other = tmp_path / "other"
    shutil.copytree(model, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    content[len(content) // 64 * 40] ^= 1
    (other / "model.safetensors").write_bytes(content)
    described = HuggingFaceSource(str(other)).info
    with pytest.raises(InputError, match=r"other: its weight files are not those that the adapters of .* were trained"):
        parse_arguments([*words, "--hf-checkpoint", str(other)], 1, lambda prefix: [128], described)


def test_model_and_adapters_in_one_checkpoint(run, model, dataset_prefix, tmp_path):
    """A checkpoint saved with the model at TP 2 is resumed on one rank without naming model or adapters."""
    words = (
        "--data-path",
        dataset_prefix,
        "--hf-checkpoint",
        model,
        "--save",
        tmp_path / "run",
        "--exit-interval",
        "2",
    )
    process = torchrun(2, "pretrain_mft.py", *RUN, *LORA, *TP2, *words)
    assert process.returncode == 0, process.stderr
    info = json.loads((tmp_path / "run" / "iter_0000002" / "mft_checkpoint.json").read_text())
    assert (info["has_base"], info["lora"]["rank"]) == (True, 4)
    words = ("--data-path", dataset_prefix, "--save", tmp_path / "run", "--load", tmp_path / "run")
    process = torchrun(1, "pretrain_mft.py", *RUN, "--lora-dropout", "0.1", "--loraplus-lr-ratio", "4", *words)
    assert process.returncode == 0, process.stderr
    assert _records(tmp_path / "run")[:2] == _records(run)[:2]
    # other ranks sample other dropout masks; losses are still close
    for ours, theirs in zip(_records(tmp_path / "run")[2:], _records(run)[2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=3e-2)
        assert ours["lr"] == theirs["lr"]

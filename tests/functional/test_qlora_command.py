"""Training of adapters on a model in 4 bits by the command: saved, resumed, from any kind of folder."""

import dataclasses
import json

import pytest

from tests.ranks import run_forked
from tests.run_records import records

RUN = (
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 4 --eval-iters 0 --lr 1e-2 --log-interval 1 "
    "--lora-rank 4 --lora-dropout 0.1 --attention-dropout 0 --hidden-dropout 0 --lr-decay-style constant"
).split()
QLORA = ["--peft-type", "qlora"]
TWO = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_folder):
    """A Llama whose rows are a multiple of a block on two ranks."""
    from tests.convert import tiny_models

    folder = tmp_path_factory.mktemp("hf") / "model"
    sizes = {"vocab_size": 511, "max_position_embeddings": 256, "hidden_size": 128, "intermediate_size": 256}
    tiny_models.write_model("llama with biases", folder, "bfloat16", tokenizer_folder, **sizes)
    return folder


def steps(folder):
    """Step, loss and gradient norm of every step that was logged."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records(folder, "train")]


def run(folder, prefix, *words, world_size=1):
    """Train and return what was printed."""
    process = run_forked(
        "pretrain_mft.py", *RUN, *words, "--data-path", prefix, "--save", folder, world_size=world_size
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def whole_run(model, dataset_prefix, tmp_path_factory):
    """Folder and output of an uninterrupted run of four steps, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, dataset_prefix, *QLORA, "--hf-checkpoint", model, "--save-interval", 2)


def test_the_log_names_the_implementation(whole_run):
    assert "frozen matrices: NF4, by torch;" in whole_run[1]


def test_checkpoints_hold_only_adapters(whole_run):
    from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader

    checkpoint = whole_run[0] / "iter_0000004"
    info = json.loads((checkpoint / "mft_checkpoint.json").read_text())
    assert (info["peft_type"], info["has_base"]) == ("qlora", False)
    reader = TensorReader(checkpoint)
    names = reader.names()
    assert len(names) == 8
    assert all(name.endswith((".lora_a", ".lora_b")) for name in names)
    assert all(reader.read(name).any() for name in names)  # each B was 0 before the first step


def test_a_resumed_run_equals_an_uninterrupted_one(whole_run, model, dataset_prefix, tmp_path):
    """Equal bit for bit, although the base is quantised again."""
    run(tmp_path, dataset_prefix, "--hf-checkpoint", model, "--load", whole_run[0], "--ckpt-step", 2)
    assert steps(tmp_path) == steps(whole_run[0])[2:]


@pytest.mark.slow
def test_on_two_ranks(model, dataset_prefix, tmp_path):
    """Runs from a checkpoint and from the Hugging Face folder are equal bit for bit, and close to a run on one rank."""
    from mft_megatron.convert.commands.huggingface import hf_to_mcore

    hf_to_mcore(["--hf", str(model), "--save", str(tmp_path / "start")])
    hf, checkpoint = ("--hf-checkpoint", model), ("--pretrained-checkpoint", tmp_path / "start")
    for number, bits in enumerate(([], ["--bf16"])):
        of_hf, of_checkpoint = tmp_path / f"hf{number}", tmp_path / f"checkpoint{number}"
        run(of_hf, dataset_prefix, *TWO, *QLORA, *bits, *hf, world_size=2)
        run(of_checkpoint, dataset_prefix, *TWO, *QLORA, *bits, *checkpoint, world_size=2)
        assert steps(of_hf) == steps(of_checkpoint)
    undropped = [*QLORA, *hf, "--lora-dropout", "0"]
    run(tmp_path / "one", dataset_prefix, *undropped)
    run(tmp_path / "two", dataset_prefix, *undropped, *TWO, world_size=2)
    run(tmp_path / "bf16", dataset_prefix, *undropped, *TWO, "--bf16", world_size=2)
    for one, two, bf16 in zip(*(steps(tmp_path / name) for name in ("one", "two", "bf16")), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
        assert one == pytest.approx(bf16, rel=5e-2)


@pytest.mark.parametrize(
    ("sizes", "ranks", "complaint"),
    [
        (
            {"ffn_hidden_size": 224},
            1,
            "rows of linear_fc2 have 224 elements on a rank, which are no whole blocks of 64; take --peft-type lora",
        ),
        (
            {"ffn_hidden_size": 192},
            2,
            "rows of linear_fc2 have 96 elements .* take a smaller --tensor-model-parallel-size",
        ),
        ({"kv_channels": 16}, 2, "rows of linear_proj have 32 elements on a rank"),
        ({"hidden_size": 96, "kv_channels": 32}, 1, "rows of linear_qkv have 96 elements on a rank"),
        ({}, 2, None),
    ],
)
def test_rows_that_are_no_multiple_of_a_block_are_refused(model, sizes, ranks, complaint):
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
    from mft_megatron.errors import InputError

    info = HuggingFaceSource(str(model)).info
    info = dataclasses.replace(info, architecture={**info.architecture, **sizes})
    words = [*RUN, *QLORA, "--data-path", "none", "--hf-checkpoint", str(model)]
    words += ["--tensor-model-parallel-size", str(ranks)]
    if complaint is None:
        assert not parse_arguments(words, ranks, lambda prefix: [128], info).saves_base
        return
    with pytest.raises(InputError, match=f"--peft-type qlora: {complaint}"):
        parse_arguments(words, ranks, lambda prefix: [128], info)


def test_a_model_is_needed(dataset_prefix):
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.errors import InputError

    words = [*RUN, *QLORA, "--data-path", "none", *"--num-layers 1 --hidden-size 64 --num-attention-heads 1".split()]
    words += ["--max-position-embeddings", "128"]
    with pytest.raises(InputError, match="--peft-type qlora needs a model to start from: give --hf-checkpoint"):
        parse_arguments(words, 1, lambda prefix: [128])

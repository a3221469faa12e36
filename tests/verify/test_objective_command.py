"""``verify.py objective`` as a command: from a checkpoint under torchrun, with a fault, and what it refuses."""

import contextlib
import io
import os
import re

import pytest

from mft_megatron import exit_codes
from mft_megatron.verify.objective.command import comparable, objective
from tests.arguments.command_line import checkpoint, parse
from tests.made_dataset import write_dataset
from tests.ranks import run_forked, run_on_ranks, torchrun
from tests.refusals import refusal, refused
from tests.verify.objective_runs import FAULTS

LENGTH = 128
SIZES = "--global-batch-size 4 --micro-batch-size 2 --train-iters 4 --lr 1e-3"
SHAPE = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --init-method-std 0.2"
CP2 = "--context-parallel-size 2"
FAMO = "--task-balance famo"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    prefix = str(tmp_path_factory.mktemp("objective") / "data")
    write_dataset(prefix, LENGTH, longest=60)
    return prefix


def test_a_run_is_certified_from_its_checkpoint(prefix, tmp_path):
    """Nothing in the run's folder changes; the third step has the order and the weights of the checkpoint."""
    folder = tmp_path / "run"
    trained = run_forked(
        "pretrain_mft.py",
        *("--data-path", prefix, "--save", folder),
        *f"{SHAPE} {SIZES} {FAMO} --exit-interval 2".split(),
    )
    assert trained.returncode == exit_codes.LEFT, trained.stderr
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    words = f"--load {folder} --save {folder} {SIZES} {CP2} --task-weights completion=3 --verify-weights *final*"
    process = torchrun(2, "tools/verify.py", "objective", prefix, *words.split())
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert any(line.startswith("step 3: 4 packs, ") for line in lines)
    assert any("CP 2" in line for line in lines)
    assert "note: dropout is random; it is 0 here" in lines
    compared = [line.split()[0] for line in lines if line.startswith("decoder.")]
    assert compared == ["decoder.final_layernorm.bias", "decoder.final_layernorm.weight"]
    assert lines[-1] == "certified: 1 step(s), every figure within its bound"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    # those of the balancer, which has made them differ since they were equal
    words = f"--load {folder} {SIZES} {FAMO} --verify-weights *final* --mft-normalization epoch"
    balanced = run_forked("tools/verify.py", "objective", prefix, *words.split())
    assert balanced.returncode == 0, balanced.stderr
    targets = re.findall(r"^(?:completion|explain|write|read) +[\d,]+ +(0\.\d+)", balanced.stdout, re.MULTILINE)
    assert len(set(targets)) == 4
    assert sum(map(float, targets)) == pytest.approx(1, abs=1e-5)


def _run_with_fault(prefix, words, fault):
    """Run the command with a fault in the layout's steps alone: exit code and output of this rank."""
    from mft_megatron.verify.objective import certificate

    run_steps = certificate.run_steps

    def with_fault(*arguments):
        with FAULTS[fault]():
            return run_steps(*arguments)

    output = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(output):
        monkeypatch.setattr(certificate, "run_steps", with_fault)
        code = objective([prefix, *words.split()])
    assert os.environ["WORLD_SIZE"] == "2"
    return code, output.getvalue()


@pytest.mark.parametrize(
    ("fault", "look_at"),
    [
        ("attention leak", "shares are right: look at labels, positions and attention"),
        ("gradients that are not finite", "shares and losses are right: look at how gradients are summed"),
    ],
)
def test_a_fault_fails(prefix, fault, look_at):
    words = f"{SHAPE} {SIZES} {CP2}"
    (code, output), other = run_on_ranks(2, _run_with_fault, prefix, words, fault)
    assert (code, other) == (1, (0, ""))
    assert "MISMATCH: above 5.0e-06" in output
    last = output.splitlines()[-1]
    assert re.match(rf"FAILED: \d+ figure\(s\) are not what they should be; {look_at}", last)
    assert "step 1: gradient decoder.layers.0.self_attention.linear_qkv.weight: relative error " in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--mft-loss focal-task", "--mft-loss focal-task: a step of it reads statistics"),
        ("--mft-normalization micro-batch", "--mft-normalization micro-batch: its loss depends on which rows"),
        ("--disable-bias-linear --num-experts 4 --bf16", "--num-experts in 16 bits"),
        ("--disable-bias-linear --num-experts 4 --moe-router-load-balancing-type sinkhorn", "sinkhorn"),
        (
            "--disable-bias-linear --num-experts 4 --moe-expert-capacity-factor 1.5",
            "--moe-expert-capacity-factor drops tokens",
        ),
        ("--verify-steps 0", "--verify-steps 0"),
        ("--verify-step 1", "unknown option --verify-step; did you mean --verify-steps?"),
    ],
)
def test_what_has_no_reference_is_refused(prefix, words, said):
    with refused(said):
        objective([prefix, *f"{SHAPE} {SIZES} {words}".split()])


def test_a_run_without_steps_is_refused(prefix, tmp_path):
    """One that only evaluates, and one that is started again after its last step."""
    folder = checkpoint(tmp_path)
    with refused("takes no step"):
        objective([prefix, *f"{SIZES} --load {folder} --skip-train".split()])
    with refused("takes no step"):
        objective([prefix, *f"{SIZES} --load {folder} --save {folder} --train-iters 5".split()])


def test_weights_that_no_pattern_finds(prefix):
    words = f"{SHAPE} {SIZES} --verify-weights encoder.*"
    process = run_forked("tools/verify.py", "objective", prefix, *words.split())
    assert process.returncode == 2
    assert refusal(process) == "error: --verify-weights: no trained weight has such a name; try '*'"


def test_what_is_random_or_written_is_left_out():
    arguments, notes = comparable(parse("--save there --lora-dropout 0.1 --peft-type lora --tensorboard-dir board"))
    assert len(notes) == 1
    regularization, lora, adapters = arguments.regularization, arguments.lora, arguments.adapters
    rates = (regularization.attention_dropout, regularization.hidden_dropout, lora.lora_dropout, adapters.dropout)
    assert set(rates) == {0.0}
    assert (arguments.checkpoint.save, arguments.logging.tensorboard_dir) == (None, None)
    assert comparable(arguments) == (arguments, [])

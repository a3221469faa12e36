"""The line at a resume: what differs from the run that was saved."""

import dataclasses

import pytest

from mft_megatron.arguments.table import GROUPS
from mft_megatron.training.restarts import differences
from mft_megatron.training.restarts.differences import batch_explanation, options_of, versions
from tests.arguments.command_line import checkpoint, resumed

SAVED = "--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --train-iters 20"


@pytest.fixture
def saved(tmp_path):
    """A function that returns what differs between a run and the options that follow."""
    first = resumed(f"--load {checkpoint(tmp_path / 'first')} {SAVED}")
    folder = checkpoint(tmp_path / "run", options=options_of(first), versions=versions())

    def differing(words, world_size=1):
        a = resumed(f"--load {folder} {SAVED} {words}", world_size)
        return differences.differences(a, a.resume.info)

    return differing


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", []),
        ("--log-interval 7 --save-interval 3 --save x --stall-timeout 5 --exit-interval 5", []),
        ("--global-batch-size 4", ["--global-batch-size 4 (was 2)"]),
        (
            "--lr 2e-3 --train-iters 30",
            ["--lr 0.002 (was 0.001)", "--train-iters 30 (was 20)", "--lr-decay-iters 30 (was 20)"],
        ),
        ("--mft-loss token", ["--mft-loss token (was task-token)"]),
        ("--task-weights a=2 b=1", ["--task-weights a=2 b=1 (was not given)"]),
        ("--hidden-dropout 0.25", ["--hidden-dropout 0.25 (was 0.1)"]),
        ("--lr-decay-style cosine", ["--lr-decay-style cosine (was linear)"]),
        ("--no-bias-swiglu-fusion", ["--no-bias-swiglu-fusion given (was not given)"]),
        ("--use-distributed-optimizer", ["--use-distributed-optimizer given (was not given)"]),
        ("--no-load-rng", ["--no-load-rng given (was not given)"]),
    ],
)
def test_each_kind_of_option(saved, words, said):
    assert sorted(saved(words)) == sorted(said)


def test_ranks_and_the_parallel_layout(saved):
    assert saved("--tensor-model-parallel-size 2", world_size=2) == [
        "--tensor-model-parallel-size 2 (was 1)",
        "2 rank(s) (was 1)",
    ]


def test_versions(saved, monkeypatch):
    now = {**versions(), "torch": "9.9", "apex": "1"}
    del now["megatron-core"]
    monkeypatch.setattr(differences, "versions", lambda: now)
    was = versions()
    assert saved("") == [
        "apex 1 (was not installed)",
        f"megatron-core not installed (was {was['megatron-core']})",
        f"torch 9.9 (was {was['torch']})",
    ]


def test_an_earlier_checkpoint_says_what_it_can(tmp_path):
    folder = checkpoint(tmp_path, precision="bf16", layout={"tensor": 2, "world": 2})
    a = resumed(f"--load {folder} --micro-batch-size 1 --global-batch-size 4 --no-load-optim")
    assert differences.differences(a, a.resume.info) == [
        "--global-batch-size 4 (was 2)",
        "--bf16 not given (was given)",
        "--tensor-model-parallel-size 1 (was 2)",
        "1 rank(s) (was 2)",
        "the checkpoint is of an earlier version and does not say its other options",
    ]


def test_an_option_that_the_saved_run_did_not_know_differs_only_where_it_is_used(tmp_path):
    options = options_of(resumed(f"--load {checkpoint(tmp_path / 'first')} {SAVED}"))
    del options["clip_grad"]
    folder = checkpoint(tmp_path / "run", options=options, versions=versions())
    for words, said in {"": [], "--clip-grad 3": ["--clip-grad 3 (was not given)"]}.items():
        a = resumed(f"--load {folder} {SAVED} {words}")
        assert differences.differences(a, a.resume.info) == said


def test_another_batch_size_is_explained(tmp_path):
    folder = checkpoint(tmp_path)
    for size, explained in ((2, False), (4, True)):
        a = resumed(f"--load {folder} --micro-batch-size 1 --global-batch-size {size}")
        text = batch_explanation(a, a.resume.info)
        assert (text is not None) == explained
    assert "the 10 packs that are consumed stay consumed" in text


def test_options_without_consequence_exist():
    known = {field.name for _, group in GROUPS for field in dataclasses.fields(group)}
    assert known >= differences.WITHOUT_CONSEQUENCE

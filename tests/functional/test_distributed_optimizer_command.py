"""fp16 with the distributed optimizer, overlapped communication and saves in the background, in whole runs."""

import itertools

import pytest

from mft_megatron.run_folder.found import latest_checkpoint
from tests.ranks import run_forked, run_on_ranks
from tests.refusals import refusal
from tests.run_records import events, records

MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights"
).split()
RUN = "--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --log-interval 1 --eval-interval 5 --eval-iters 1".split()
FP16 = "--fp16 --initial-loss-scale 4194304 --hysteresis 1 --loss-scale-window 3".split()
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 9001".split()


def pretrain(words):
    """Run the command on this rank."""
    import os

    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.training import pretrain

    pretrain.pretrain(parse_arguments(words, 2, lambda prefix: [128]), os.environ["RANK"] == "0")


def test_overflows_saves_in_the_background_and_resumes(dataset_prefix, tmp_path):
    """The scale falls from 2^22 step by step; skipped steps are counted, logged and not refused as divergence."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    words = [*RUN, *FP16, *OVERLAP, "--data-path", dataset_prefix, "--train-iters", "15", "--async-save"]
    run_on_ranks(2, pretrain, [*words, *MODEL, "--save", str(whole), "--save-interval", "11"])
    skipped, trained = events(whole, "skip"), records(whole, "train")
    assert {record["reason"] for record in skipped} == {"gradients overflow at the loss scale"}
    steps = sorted([*skipped, *trained], key=lambda record: record["step"])
    assert [record["step"] for record in steps] == list(range(1, 16))
    assert len(skipped) > 3
    assert steps[0]["loss_scale"] == 2.0**22
    for before, after in itertools.pairwise(steps):
        factor = after["loss_scale"] / before["loss_scale"]
        assert factor == 0.5 if before["kind"] == "event" else factor in (1.0, 2.0)
    # the schedule advances with updates only
    assert [record["lr"] for record in trained] == pytest.approx([1e-3 * (1 - i / 15) for i in range(len(trained))])
    assert [record["step"] for record in events(whole, "save")] == [11, 15]
    latest = latest_checkpoint(whole)
    info = latest.info
    assert (latest.path.name, info.skipped_steps, info.iteration - info.skipped_steps) == (
        "iter_0000015",
        len(skipped),
        len(trained),
    )
    assert (info.precision, info.optimizer, info.distributed_optimizer) == ("fp16", "adam", True)
    run_on_ranks(2, pretrain, [*words, "--load", str(whole / "iter_0000011"), "--save", str(again)])
    resumed, expected = records(again, "train"), [record for record in trained if record["step"] > 11]
    assert all(record.pop("step_time") > 0 for record in resumed + expected)
    assert resumed == expected
    assert records(again, "valid") == records(whole, "valid")[-1:]


@pytest.mark.parametrize(
    ("scale", "remedy"),
    [
        (["--initial-loss-scale", 2**40, "--min-loss-scale", 2**39, "--hysteresis", 1], "Lower --lr"),
        pytest.param(["--loss-scale", 2**39], "Lower --loss-scale", marks=pytest.mark.slow),
    ],
)
def test_a_scale_that_cannot_be_lowered_ends_the_run(dataset_prefix, tmp_path, scale, remedy):
    words = ["pretrain_mft.py", *RUN, *MODEL, "--data-path", dataset_prefix, "--train-iters", 5, "--fp16", *scale]
    line = refusal(run_forked(*words))
    assert "gradients overflow at the loss scale 5.49756e+11, and it cannot be lowered" in line
    assert remedy in line

"""Optimizers on CUDA: the distributed one, its states in the host's memory, a loss scale, and their checkpoints."""

import pytest

from tests.gpu.device_runs import on, worst

SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 30001"
OFFLOAD = f"{SHARDED} --use-precision-aware-optimizer --optimizer-cpu-offload"
WAYS = {
    "distributed": SHARDED,
    "half of it offloaded": f"{OFFLOAD} --optimizer-offload-fraction 0.5",
    "offloaded": OFFLOAD,
    "offloaded meanwhile": f"{OFFLOAD} --overlap-cpu-optimizer-d2h-h2d --use-torch-optimizer-for-cpu-offload",
}


@pytest.mark.parametrize("way", WAYS)
def test_where_states_are_changes_no_number(dataset_prefix, way):
    plain, sharded = (on("cuda", "train", dataset_prefix, f"--bf16 {options}") for options in ("", WAYS[way]))
    assert worst(sharded["curve"], plain["curve"]) < 1e-3


@pytest.mark.parametrize("reader", ["", *WAYS.values()])
@pytest.mark.parametrize("writer", ["", *WAYS.values()])
def test_any_goes_on_from_any_other(dataset_prefix, tmp_path, writer, reader):
    saved = on("cuda", "save", dataset_prefix, f"--bf16 {writer}", str(tmp_path))
    resumed = on("cuda", "load", dataset_prefix, f"--bf16 --seed 77 {reader}", saved["path"])
    assert worst(resumed["third"], saved["third"]) < (0 if writer == reader else 1e-3) + 1e-9


def test_fp16_is_that_of_the_cpu(dataset_prefix):
    there, here = (
        on(device, "train", dataset_prefix, "--fp16 --initial-loss-scale 1024") for device in ("cuda", "cpu")
    )
    assert worst(there["curve"], here["curve"]) < 1e-2


def test_a_save_in_the_background_is_what_was_there(dataset_prefix, tmp_path):
    saved = on("cuda", "save", dataset_prefix, f"--bf16 {SHARDED} --async-save --save {tmp_path}", str(tmp_path))
    resumed = on("cuda", "load", dataset_prefix, f"--bf16 --seed 77 {SHARDED}", saved["path"])
    assert worst(resumed["third"], saved["third"]) < 1e-9

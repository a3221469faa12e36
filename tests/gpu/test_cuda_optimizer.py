"""Optimizers on CUDA: distributed, with states in the host's memory, with a loss scale; and their checkpoints."""

import pytest

from tests.gpu.device_runs import on, worst

SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 30001"
OFFLOAD = f"{SHARDED} --use-precision-aware-optimizer --optimizer-cpu-offload"
PLACEMENTS = {
    "distributed": SHARDED,
    "half offloaded": f"{OFFLOAD} --optimizer-offload-fraction 0.5",
    "offloaded": OFFLOAD,
    "offloaded with overlap": f"{OFFLOAD} --overlap-cpu-optimizer-d2h-h2d --use-torch-optimizer-for-cpu-offload",
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement_of_states_changes_no_result(dataset_prefix, placement):
    plain, sharded = (
        on("cuda", "train", dataset_prefix, f"--bf16 {options}") for options in ("", PLACEMENTS[placement])
    )
    assert worst(sharded["curve"], plain["curve"]) < 1e-3


@pytest.mark.parametrize("reader", ["", *PLACEMENTS.values()])
@pytest.mark.parametrize("writer", ["", *PLACEMENTS.values()])
def test_each_loads_the_checkpoints_of_the_others(dataset_prefix, tmp_path, writer, reader):
    saved = on("cuda", "save", dataset_prefix, f"--bf16 {writer}", str(tmp_path))
    resumed = on("cuda", "load", dataset_prefix, f"--bf16 --seed 77 {reader}", saved["path"])
    assert worst(resumed["third"], saved["third"]) < (0 if writer == reader else 1e-3) + 1e-9


def test_fp16_equals_the_cpu(dataset_prefix):
    on_gpu, on_cpu = (
        on(device, "train", dataset_prefix, "--fp16 --initial-loss-scale 1024") for device in ("cuda", "cpu")
    )
    assert worst(on_gpu["curve"], on_cpu["curve"]) < 1e-2


def test_a_background_save_is_that_of_its_step(dataset_prefix, tmp_path):
    saved = on("cuda", "save", dataset_prefix, f"--bf16 {SHARDED} --async-save --save {tmp_path}", str(tmp_path))
    resumed = on("cuda", "load", dataset_prefix, f"--bf16 --seed 77 {SHARDED}", saved["path"])
    assert worst(resumed["third"], saved["third"]) < 1e-9

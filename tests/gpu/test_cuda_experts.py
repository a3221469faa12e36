"""A mixture of experts on a GPU against the CPU."""

import pytest

from tests.gpu.device_runs import on

EXPERTS = (
    "--num-experts 4 --moe-ffn-hidden-size 96 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2 "
    "--moe-z-loss-coeff 1e-3 --moe-shared-expert-intermediate-size 64"
)


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_experts(dataset_prefix, dispatcher):
    words = f"{EXPERTS} --moe-token-dispatcher-type {dispatcher}"
    ours, theirs = (on(device, "train", dataset_prefix, words)["curve"] for device in ("cuda", "cpu"))
    for step, expected in zip(ours, theirs, strict=True):
        assert step == pytest.approx(expected, rel=1e-4)

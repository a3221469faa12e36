"""A mixture of experts on a GPU against the CPU."""

import pytest

from tests.gpu.device_runs import curves, worst

EXPERTS = (
    "--num-experts 4 --moe-ffn-hidden-size 96 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2 "
    "--moe-z-loss-coeff 1e-3 --moe-shared-expert-intermediate-size 64"
)


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_experts(dataset_prefix, dispatcher, within):
    words = f"{EXPERTS} --moe-token-dispatcher-type {dispatcher}"
    within(worst(*curves(dataset_prefix, words)), 1e-4)

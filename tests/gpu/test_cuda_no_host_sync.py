"""Neither the objective nor a micro-batch makes the host wait for a GPU, by torch's check of synchronizations."""

import pytest
import torch

from tests.gpu.device_runs import on
from tests.objective_step import OBJECTIVES, inputs, run


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_no_synchronization(objective):
    arguments = inputs("cuda")
    run(objective, *arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(objective, *arguments)
        with pytest.raises(RuntimeError):
            arguments[1].sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", ["--bf16", "--bf16 --mft-loss focal-sample --cross-entropy-impl megatron"])
def test_a_step_waits_for_the_gradient_norm_alone(dataset_prefix, options):
    found = on("cuda", "waits", dataset_prefix, options)
    assert len(found) <= 1, found

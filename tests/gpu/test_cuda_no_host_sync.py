"""The objective never makes the host wait for a GPU, as torch itself sees it."""

import pytest
import torch

from tests.objective_step import OBJECTIVES, inputs, run


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_cuda_sees_no_wait(objective):
    made = inputs("cuda")
    run(objective, *made)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(objective, *made)
        with pytest.raises(RuntimeError):
            made[1].sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")

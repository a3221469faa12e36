"""The objective never makes the host wait for a GPU: torch's check of synchronizations is an error."""

import pytest
import torch

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

"""The objective never makes the host wait for the device: neither to read a value or a size, nor to copy.

The step runs on the meta device, whose tensors have shapes and no values: reading one fails.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mft_megatron.losses.objective import Objective
from tests.objective_step import OBJECTIVES, inputs, run


class NoBlockingCopies(TorchDispatchMode):
    """Fails where a tensor goes from one kind of device to another and the host waits for it."""

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        if operator is torch.ops.aten._to_copy.default:
            moved = arguments[0].device.type != result.device.type
            assert not moved or keywords.get("non_blocking"), f"a copy to {result.device} that the host waits for"
        elif operator is torch.ops.aten.copy_.default:
            moved = arguments[0].device.type != arguments[1].device.type
            assert not moved or arguments[2:3] == (True,), f"a copy to {result.device} that the host waits for"
        return result


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_nothing_reads_a_value_from_the_device(objective, weighted):
    step_inputs = inputs("meta", weighted)
    with NoBlockingCopies():
        gradient, by_task_K = run(objective, *step_inputs)
    assert gradient.is_meta
    assert by_task_K.is_meta


PLANTS = {
    "item": lambda loss_BS, mask_BS: loss_BS.sum().item(),
    "if": lambda loss_BS, mask_BS: 1 if loss_BS.sum() > 0 else 2,
    "list": lambda loss_BS, mask_BS: loss_BS.tolist(),
    "boolean mask": lambda loss_BS, mask_BS: loss_BS[mask_BS > 0],
    "unique": lambda loss_BS, mask_BS: mask_BS.unique(),
    "to the host": lambda loss_BS, mask_BS: loss_BS.cpu(),
    "from the host": lambda loss_BS, mask_BS: torch.ones(2).to(loss_BS.device),
    "into a tensor of the device": lambda loss_BS, mask_BS: torch.empty_like(loss_BS).copy_(torch.ones(1)),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_the_check_sees_a_planted_wait(plant):
    class Planted(Objective):
        def contribution(self, factors, batch, loss_BS, **others):
            PLANTS[plant](loss_BS.detach(), batch.loss_mask_BS)
            return super().contribution(factors, batch, loss_BS, **others)

    step_inputs = inputs("meta")
    with pytest.raises((RuntimeError, AssertionError)), NoBlockingCopies():
        run(Planted(), *step_inputs)

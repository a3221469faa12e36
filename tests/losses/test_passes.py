"""Passes over the tokens of a micro-batch: what slope, objective and sums have in common is computed once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mft_megatron.losses.objective import Objective
from tests.objective_step import inputs, run


class Passes(TorchDispatchMode):
    """Counts the operators that read or write all tokens; each is a kernel that the host launches."""

    def __init__(self, tokens):
        super().__init__()
        self._tokens, self.count = tokens, 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, result)) if isinstance(leaf, torch.Tensor)]
        self.count += not operator.is_view and any(tensor.numel() >= self._tokens for tensor in tensors)
        return result


@pytest.mark.parametrize(
    ("objective", "most"),
    [
        (Objective("task-token"), 14),
        (Objective("task-token", per_micro_batch=True), 19),
        (Objective("task-sample"), 17),
        (Objective("focal-sample"), 37),
        (Objective("focal-task"), 47),
    ],
    ids=str,
)
def test_passes_of_a_micro_batch_forward_and_backward(objective, most):
    step_inputs = inputs("meta")
    with Passes(step_inputs[1].numel()) as passes:
        run(objective, *step_inputs)
    assert passes.count <= most

"""The line of Megatron-Core or of this package that something happens for: the innermost one on the stack."""

import dataclasses
import functools
import sys
from pathlib import PurePath
from types import CodeType, FrameType

import torch

_SIMULATION = ("mft_megatron/dry_run/", "mft_megatron/mcore/platform/simulation/")
# functions whose new tensors are states of an optimizer
_STATE_MAKERS = {"_init_group", "initialize_state", "_initialize_state"}


@dataclasses.dataclass(frozen=True)
class CodeLine:
    """A line of code on the stack, and what it is part of.

    Attributes:
        text: ``file:line``.
        scheduled: within the pipeline schedule, and not in the data-parallel messages and sums of a step, which may
            overlap with its first or last micro-batch.
        output: part of the output layer or of the loss.
        state: makes a state of the optimizer.
    """

    text: str
    scheduled: bool
    output: bool
    state: bool


@dataclasses.dataclass(frozen=True)
class _Function:
    file: str
    named: bool
    schedules: bool
    once: bool
    output: bool
    state: bool


@functools.cache
def _function(code: CodeType) -> _Function:
    parts = PurePath(code.co_filename).parts
    root = next((name for name in ("mft_megatron", "megatron") if name in parts), None)
    file = "/".join(parts[parts.index(root) :]) if root else ""
    return _Function(
        file,
        named=bool(root) and not file.startswith(_SIMULATION),
        schedules=file == "megatron/core/pipeline_parallel/schedules.py",
        once="finalize_model_grads" in code.co_name or file == "megatron/core/distributed/param_and_grad_buffer.py",
        output=file.startswith(("mft_megatron/losses/", "mft_megatron/mcore/output_layer/"))
        or file.endswith("cross_entropy.py")
        or (code.co_name == "_postprocess" and file.endswith(("gpt_model.py", "gpt.py"))),
        state=code.co_name in _STATE_MAKERS,
    )


def code_line() -> CodeLine:
    """The line of code that this is called for."""
    text, scheduled, once, output, state = "", False, False, False, False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        function = _function(frame.f_code)
        if function.named and not text:
            text = f"{function.file}:{frame.f_lineno}"
            if function.schedules and (node := torch._C._current_autograd_node()) is not None:
                text = f"{node.name()}, backward at {text}"
        scheduled |= function.schedules
        once |= function.once
        output |= function.output
        state |= function.state
        frame = frame.f_back
    return CodeLine(text or "outside of Megatron-Core and this package", scheduled and not once, output, state)

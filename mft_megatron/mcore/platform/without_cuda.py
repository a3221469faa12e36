"""Replacements that let Megatron-Core run where there is no CUDA; never active where there is.

Megatron-Core names CUDA in four ways: functions of ``torch.cuda``, the literal ``device="cuda"`` in tensor factories,
``Tensor.cuda()``, and type names such as ``torch.cuda.FloatTensor``. Each is pointed at the CPU here.
:data:`.patches.WITHOUT_CUDA` applies them in order and names the test that shows that each is still needed.
"""

import contextlib
import functools
import importlib
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")
FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "empty_like")
# modules of Megatron-Core that make tensors on the device "cuda"
FACTORY_USERS = (
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "utils",
)


class _NoStream:
    """A stream or event for a machine that has none: all work that it could wait for is done."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def record_event(self, event: "_NoStream | None" = None) -> "_NoStream":
        return event or _NoStream()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _replace(owner: object, **values: object) -> None:
    """Set attributes of a module or class whatever their types: that of torch's function is another one."""
    for name, value in values.items():
        setattr(owner, name, value)


def stub_jit() -> None:
    """Keep ``megatron.core.jit`` from compiling small functions with ``torch.compile``.

    Saves time only: 27 s at the first step on a CPU.
    """
    jit, same, nothing = types.ModuleType("megatron.core.jit"), lambda function: function, lambda: None
    _replace(jit, jit_fuser=same, noop_decorator=same, enable_jit_fuser=nothing, disable_jit_fuser=nothing)
    sys.modules["megatron.core.jit"] = jit


def replace_cuda_functions() -> None:
    """Give functions of ``torch.cuda`` that Megatron-Core calls the meaning that they have on one CPU."""
    nothing = lambda *args, **kwargs: None  # noqa: E731
    stream = lambda *args, **kwargs: _NoStream()  # noqa: E731
    _replace(
        torch.cuda,
        current_device=lambda: CPU,
        synchronize=nothing,
        current_stream=stream,
        default_stream=stream,
        stream=lambda stream: contextlib.nullcontext(),
        Stream=_NoStream,
        Event=_NoStream,
        # Megatron-Core's tracker of random states forks the device's generator; here that is torch's.
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        manual_seed=torch.manual_seed,
    )
    _replace(torch.cuda.nvtx, range_push=nothing, range_pop=nothing)


def replace_rng_state() -> None:
    """Let Megatron-Core's tracker of random states use torch's generator for the device's.

    The tracker reaches that through two functions of its module. It warns when the CPU's generator has moved in a
    region meant for the device's; here they are one.
    """
    from megatron.core.tensor_parallel import random

    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    _replace(
        random,
        _get_cuda_rng_state=lambda device=CPU, clone=False, graph_safe=False: torch.get_rng_state(),
        _set_cuda_rng_state=lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state),
    )


class _TorchOnCpu:
    """The module ``torch`` with tensor factories that ignore ``device``; everything else is torch's.

    torch itself is not changed, since other libraries in the process use its factories, too.
    """

    def __init__(self) -> None:
        _replace(self, **{name: _on_cpu(getattr(torch, name)) for name in FACTORIES})

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return on_cpu


def replace_factories() -> None:
    """Let the modules of Megatron-Core that make tensors on the device "cuda" make them on the CPU."""
    for name in FACTORY_USERS:
        _replace(importlib.import_module(f"megatron.core.{name}"), torch=_TorchOnCpu())


def replace_tensor_methods() -> None:
    """Let ``Tensor.type`` name CUDA types, by which Megatron-Core's optimizer sorts, and ``Tensor.cuda`` do nothing."""
    original_type: Callable[..., Any] = torch.Tensor.type

    def cuda_type(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original_type(tensor, dtype, *args, **kwargs)
        return original_type(tensor).replace("torch.", "torch.cuda.", 1)

    _replace(torch.Tensor, type=cuda_type, cuda=lambda tensor, *args, **kwargs: tensor)


def convert_token_counts() -> None:
    """Make arrays of the counts of tokens that ranks send to experts, although they are on the CPU already.

    Megatron-Core makes arrays only of counts that it copies from a device; ``all_to_all`` does not take tensors.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def convert(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return value.numpy() if as_numpy and torch.is_tensor(value) else value

    _replace(token_dispatcher, maybe_move_tensor_to_cpu=convert)

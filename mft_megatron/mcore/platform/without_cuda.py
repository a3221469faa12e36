"""Replacements that let Megatron-Core 0.16.1 run where there is no CUDA; never active where there is.

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

import torch

CPU = torch.device("cpu")
FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "empty_like")
# the modules of Megatron-Core that make tensors on the device "cuda"
FACTORY_USERS = (
    "dist_checkpointing.exchange_utils",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "utils",
)


class _NoStream:
    """A stream or event on a machine that has none: everything has already happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, event=None):
        return event or _NoStream()

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def stub_jit() -> None:
    """Keep ``megatron.core.jit`` from compiling small functions with ``torch.compile``.

    Saves time only: 27 s at the first step on a CPU.
    """
    jit = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = jit.noop_decorator = lambda function: function
    jit.enable_jit_fuser = jit.disable_jit_fuser = lambda: None
    sys.modules["megatron.core.jit"] = jit


def replace_cuda_functions() -> None:
    """Give functions of ``torch.cuda`` that Megatron-Core calls the meaning they have on one CPU."""
    nothing = lambda *args, **kwargs: None  # noqa: E731
    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = nothing
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: _NoStream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.Stream = torch.cuda.Event = _NoStream
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = nothing
    # Megatron's tracker of random states forks the device's generator; here that is torch's own.
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed


def replace_rng_state() -> None:
    """Let Megatron-Core's tracker of random states use torch's generator for the device's.

    The tracker reaches that through two functions of its module. It warns when the CPU's generator has moved in a
    region meant for the device's; here they are one.
    """
    from megatron.core.tensor_parallel import random

    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    random._get_cuda_rng_state = lambda device=CPU, clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


class _TorchOnCpu:
    """``torch`` as modules of Megatron-Core see it: its tensor factories make CPU tensors, all else is torch's.

    torch itself is not changed, since other libraries in the process use its factories, too.
    """

    def __init__(self):
        for name in FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name):
        return getattr(torch, name)


def _on_cpu(factory):
    @functools.wraps(factory)
    def make(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def replace_factories() -> None:
    """Have the modules of Megatron-Core that make tensors on the device "cuda" make them on the CPU."""
    for name in FACTORY_USERS:
        importlib.import_module(f"megatron.core.{name}").torch = _TorchOnCpu()


def replace_tensor_methods() -> None:
    """Let ``Tensor.type`` name CUDA types, by which Megatron-Core's optimizer sorts, and ``Tensor.cuda`` do nothing."""
    original_type = torch.Tensor.type

    def cuda_type(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return original_type(self, dtype, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def convert_token_counts() -> None:
    """Make arrays of the counts of tokens that ranks send each other's experts, although they are on the CPU already.

    Megatron-Core makes arrays only of counts that it copies from a device; tensors are no counts to ``all_to_all``.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def convert(value, as_numpy=False, record_stream=False):
        return value.numpy() if as_numpy and torch.is_tensor(value) else value

    token_dispatcher.maybe_move_tensor_to_cpu = convert

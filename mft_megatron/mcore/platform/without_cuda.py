"""What Megatron-Core 0.16.1 needs replaced to run where there is no CUDA, and why.

Megatron-Core names CUDA in four ways: functions of ``torch.cuda``, the literal ``device="cuda"`` in tensor factories,
``Tensor.cuda()``, and type names such as ``torch.cuda.FloatTensor``. Each is pointed at the CPU here. Nothing of this
is active on a machine with CUDA; ``tests/mcore/platform/test_without_cuda.py`` shows that every replacement is still
needed, but for the first, which saves time only.
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


def _stub_jit() -> None:
    """``megatron.core.jit`` compiles small functions with ``torch.compile``: 27 s at the first step on a CPU."""
    jit = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = jit.noop_decorator = lambda function: function
    jit.enable_jit_fuser = jit.disable_jit_fuser = lambda: None
    sys.modules["megatron.core.jit"] = jit


def _replace_cuda_functions() -> None:
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


def _replace_rng_state() -> None:
    """The tracker reaches the generator through two functions of its module.

    It warns when the CPU's generator has moved in a region meant for the device's; here they are one.
    """
    from megatron.core.tensor_parallel import random

    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    random._get_cuda_rng_state = lambda device=CPU, clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


class _TorchOnCpu:
    """``torch`` as a module of Megatron-Core is to see it: tensor factories make CPU tensors, all else is torch's own.

    torch itself stays untouched, since other libraries in the process use its factories, too.
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


def _replace_factories() -> None:
    for name in FACTORY_USERS:
        importlib.import_module(f"megatron.core.{name}").torch = _TorchOnCpu()


def _replace_tensor_methods() -> None:
    original_type = torch.Tensor.type

    def cuda_type(self, dtype=None, *args, **kwargs):
        """The optimizer sorts parameters by the names of CUDA tensor types."""
        if dtype is not None:
            return original_type(self, dtype, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _replace_numbers_of_tokens() -> None:
    """What tokens are sent between experts is told in tensors that Megatron makes arrays of when it fetches them.

    Here they are where they are wanted already, and stay tensors, of which torch makes no lists of numbers.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def fetch(value, as_numpy=False, record_stream=False):
        return value.numpy() if as_numpy and torch.is_tensor(value) else value

    token_dispatcher.maybe_move_tensor_to_cpu = fetch


REPLACEMENTS = {
    "jit": _stub_jit,
    "functions of torch.cuda": _replace_cuda_functions,
    "tensor methods": _replace_tensor_methods,
    "random-number state": _replace_rng_state,
    "tensor factories": _replace_factories,
    "numbers of tokens": _replace_numbers_of_tokens,
}


@functools.cache
def replace() -> None:
    """Apply every replacement, once per process."""
    for apply in REPLACEMENTS.values():
        apply()

"""Small functions of Megatron-Core that ``torch.compile`` turns into one CUDA kernel each, where that works.

Compiling needs Triton and a C compiler on every node, and would fail at the first step otherwise.
"""

import functools
import sys
import types
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from mft_megatron.errors import in_a_line

P = ParamSpec("P")
R = TypeVar("R")

# whether the functions are compiled, for all of them and at any time
_compiles = True


def choose_at_each_call() -> None:
    """Replace ``megatron.core.jit`` so that its functions can be left as they are after Megatron-Core's import.

    Its own ``disable_jit_fuser`` changes nothing in modules that were imported before, and options are known only then.
    """
    jit = types.ModuleType("megatron.core.jit")
    for name, value in {
        "jit_fuser": fuse,
        "noop_decorator": lambda function: function,
        "enable_jit_fuser": functools.partial(enable, True),
        "disable_jit_fuser": functools.partial(enable, False),
    }.items():
        setattr(jit, name, value)
    sys.modules["megatron.core.jit"] = jit


def fuse(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function on tensors that is compiled at its first call, unless :func:`enable` says otherwise."""
    compiled = torch.compile(function)

    @functools.wraps(function)
    def fused(*arguments: P.args, **options: P.kwargs) -> R:
        # within another one it becomes part of that
        chosen = compiled if _compiles and not torch.compiler.is_compiling() else function
        return chosen(*arguments, **options)

    return fused


def enable(compiles: bool) -> None:
    """Say whether the functions are compiled; at the start they are."""
    global _compiles
    _compiles = compiles


def problem(device: torch.device) -> str | None:
    """Compile a function for a device and run it; returns why that does not work in a line, or ``None`` if it does."""
    numbers = torch.arange(8.0, device=device)
    try:
        right = torch.compile(_double)(numbers).equal(2 * numbers)
    except Exception as error:  # of torch, Triton, the C compiler or the file system
        return in_a_line(getattr(error, "inner_exception", error))
    return None if right else "a compiled function gave wrong numbers"


def _double(numbers: torch.Tensor) -> torch.Tensor:
    return numbers + numbers

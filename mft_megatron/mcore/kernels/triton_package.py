"""Triton, where it is installed; modules of kernels take it from here, so that they can be imported without it."""

from collections.abc import Callable
from typing import Any

__all__ = ["jit", "tl", "triton"]

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(function: Callable[..., None]) -> Any:
    """Make a kernel of a function; without Triton, where nothing launches it, give it back."""
    return function if triton is None else triton.jit(function)

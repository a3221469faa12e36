"""Patterns of layers in Megatron's notation: every N-th layer, or a list with a number for each layer."""

import ast
import json
import math
from typing import overload

from mft_megatron.errors import InputError

# Longest list that is accepted, more than the layers of any model.
_LIMIT = 100_000


def layer_pattern(text: str) -> int | list[int]:
    """Parse a number, or a list of whole numbers, which may be built with ``+`` and ``*``: ``([1]*3+[0])*2``.

    Raises:
        InputError: the text is neither.
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        value = []
    if value == []:
        raise InputError(f"{text!r} is neither a number nor a list of numbers such as ([1]*3+[0])*2")
    return value


def _value(node: ast.expr) -> int | list[int]:
    """Evaluate an expression of whole numbers and lists of them.

    Raises:
        ValueError: it is anything else, or too long.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_whole_number(entry) for entry in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_whole_number(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        size = math.prod(len(side) if isinstance(side, list) else side for side in (left, right))
        match node.op, left, right:
            case ast.Add(), int(), int():
                return left + right
            case ast.Add(), list(), list():
                return left + right
            case ast.Mult(), int(), int() if size <= _LIMIT:
                return left * right
            case ast.Mult(), list(), int() if size <= _LIMIT:
                return left * right
            case ast.Mult(), int(), list() if size <= _LIMIT:
                return left * right
    raise ValueError("not a number or a list of numbers")


def _whole_number(node: ast.expr) -> int:
    value = _value(node)
    if isinstance(value, list):
        raise ValueError("a list in a list")
    return value


def layer_frequency(text: str | int) -> int | str:
    """Parse ``--moe-layer-freq`` or ``--window-attn-skip-freq`` into the form that a checkpoint stores.

    Returns:
        a number N of at least 1, for every N-th layer, or a list of 0 and 1 without operators: ``"[0,1,1]"``.

    Raises:
        ValueError: the text is neither.
    """
    try:
        pattern = layer_pattern(str(text))
    except InputError as error:
        raise ValueError(str(error)) from None
    if isinstance(pattern, int):
        if pattern < 1:
            raise ValueError(f"{pattern} is below 1")
        return pattern
    if set(pattern) - {0, 1}:
        raise ValueError(f"{text!r} has other numbers than 0 and 1")
    return f"[{','.join(map(str, pattern))}]"


# The message of argparse that refuses a value contains the function's name.
layer_frequency.__name__ = "number or list of 0 and 1"


@overload
def numbers_of(frequency: None) -> None: ...
@overload
def numbers_of(frequency: int | str) -> int | list[int]: ...
def numbers_of(frequency: int | str | None) -> int | list[int] | None:
    """Convert a result of :func:`layer_frequency` to the form of Megatron-Core: a number, or a list of 0 and 1.

    ``None`` stays ``None``.
    """
    if not isinstance(frequency, str):
        return frequency
    numbers: list[int] = json.loads(frequency)
    return numbers

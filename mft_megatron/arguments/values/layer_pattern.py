"""Options that say which layers differ from the others, as Megatron writes them: every N-th, or a list."""

import ast
import json

from mft_megatron.errors import InputError

# layers of a list; more than any model has
_LIMIT = 100_000


def layer_pattern(text: str) -> int | list[int]:
    """A number, or a list of whole numbers that is written out or put together with ``+`` and ``*``: ``([1]*3+[0])*2``.

    Raises:
        InputError: anything else.
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        value = None
    if isinstance(value, int) or (value and all(type(entry) is int for entry in value)):
        return value
    raise InputError(f"{text!r} is neither a number nor a list of numbers such as ([1]*3+[0])*2")


def _value(node: ast.expr) -> int | list[int]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_value(entry) for entry in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        sizes = [len(side) if isinstance(side, list) else side for side in (left, right)]
        if sizes[0] * sizes[1] > _LIMIT:
            raise ValueError("too long")
        return left * right
    raise ValueError("not a list")


def layer_frequency(text: str | int) -> int | str:
    """The value of such an option as a checkpoint keeps it: a number, or a list of 0 and 1 spelt out: ``"[0,1,1]"``.

    Raises:
        ValueError: it is neither, or the number is below 1.
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


# argparse names the function where it refuses a value
layer_frequency.__name__ = "number or list of 0 and 1"


def numbers_of(frequency: int | str | None) -> int | list[int] | None:
    """What :func:`layer_frequency` yields, with its list as numbers, as Megatron-Core takes it; ``None`` stays."""
    return json.loads(frequency) if isinstance(frequency, str) else frequency

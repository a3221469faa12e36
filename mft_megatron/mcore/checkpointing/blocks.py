"""Rectangular blocks of a tensor, by offset and shape."""

from collections.abc import Sequence


def overlap(
    first: Sequence[int], first_shape: Sequence[int], second: Sequence[int], second_shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The overlap of two blocks of a tensor, as an index of the first and of the second; ``None`` if there is none."""
    in_first, in_second = [], []
    for a, a_size, b, b_size in zip(first, first_shape, second, second_shape, strict=True):
        start, end = max(a, b), min(a + a_size, b + b_size)
        if start >= end:
            return None
        in_first.append(slice(start - a, end - a))
        in_second.append(slice(start - b, end - b))
    return tuple(in_first), tuple(in_second)

"""Check that numbers are within the bounds of their options."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.options import out_of_range


def check_ranges(a: Arguments) -> str | None:
    """Check every group; before and after completion."""
    return next(filter(None, map(out_of_range, a.groups())), None)

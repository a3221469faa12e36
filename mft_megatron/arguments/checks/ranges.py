"""Numbers within their bounds."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.options import out_of_range


def check_ranges(a: Arguments) -> str | None:
    return next(filter(None, map(out_of_range, a.groups())), None)

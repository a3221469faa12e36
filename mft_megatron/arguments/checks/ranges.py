"""Numbers within their bounds."""

import dataclasses

from mft_megatron.arguments.table import Arguments
from mft_megatron.options import out_of_range


def check_ranges(a: Arguments) -> str | None:
    groups = (value for value in vars(a).values() if dataclasses.is_dataclass(value))
    return next(filter(None, map(out_of_range, groups)), None)

"""Check weights that are read for NaN and infinities, which would be seen later, as a loss that is NaN."""

import torch
from torch import Tensor

from mft_megatron.errors import InputError


def refuse_non_finite(content: Tensor, where: str, remedy: str) -> None:
    """Check a part of a weight, in one pass over it.

    Args:
        content: any shape, of a floating-point dtype, on any device.
        where: file or folder and name of the weight, for the message.
        remedy: what the user can do.

    Raises:
        InputError: an element is NaN or infinite.
    """
    if not content.numel():
        return
    least, most = torch.aminmax(content.detach())  # both are NaN where an element is
    if not torch.stack((least, most)).isfinite().all():
        kind = "NaN" if content.isnan().any() else "an infinity"
        raise InputError(f"{where} has {kind} in it, and every loss would be NaN; {remedy}")

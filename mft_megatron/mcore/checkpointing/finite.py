"""Check weights that are read or written for NaN and infinities, which would be seen later, as a loss that is NaN."""

import torch
from torch import Tensor

from mft_megatron.errors import InputError
from mft_megatron.exit_codes import DIVERGED


class NotFiniteError(InputError):
    """A weight or a state of the optimizer is not finite, on any rank, and nothing of the run is saved.

    Attributes:
        found: its name and what it has, to be followed by "in it".
    """

    def __init__(self, message: str, found: str):
        super().__init__(message, code=DIVERGED)
        self.found = found


def non_finite(content: Tensor) -> str | None:
    """Name what is not finite in a tensor, in one pass over it: "NaN" or "an infinity"; ``None`` if all is finite.

    Args:
        content: any shape, of a floating-point dtype, on any device.
    """
    if not content.numel():
        return None
    least, most = torch.aminmax(content.detach())  # both are NaN where an element is
    if torch.stack((least, most)).isfinite().all():
        return None
    return "NaN" if content.isnan().any() else "an infinity"


def refuse_non_finite(content: Tensor, where: str, remedy: str) -> None:
    """Check a part of a weight that is read.

    Args:
        content: any shape, of a floating-point dtype, on any device.
        where: file or folder and name of the weight, for the message.
        remedy: what the user can do.

    Raises:
        InputError: an element is NaN or infinite.
    """
    kind = non_finite(content)
    if kind is not None:
        raise InputError(f"{where} has {kind} in it, and every loss would be NaN; {remedy}")


def refuse_to_write(content: Tensor, name: str) -> None:
    """Check a weight, or a part of one, that a conversion, a merge or an export is about to write.

    Args:
        content: any shape, of a floating-point dtype, on any device.
        name: of the weight where it is written.

    Raises:
        InputError: an element is NaN or infinite.
    """
    kind = non_finite(content)
    if kind is not None:
        raise InputError(
            f"{name} would have {kind} in it, and every answer of the model would be NaN; nothing is written. Take an "
            "earlier checkpoint, or a wider dtype where weights are converted to fp16"
        )

"""Copies between the host and the device that the host does not wait for.

::

    arrays on the host ─► one buffer, each at a multiple of 16 bytes ─► one copy ─► tensors on the device
    tensors on the device ─► one copy to a buffer, read after the host has waited for something later

A copy from or to memory that is not pinned goes through a buffer of the driver, and the host waits for that.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mft_megatron.mcore.platform import devices

# kernels load up to so many bytes at once
ALIGNMENT = 16


def copy_together(arrays: Sequence[np.ndarray], dtypes: Sequence[torch.dtype], device: torch.device) -> list[Tensor]:
    """Copy arrays to a device in one piece.

    Args:
        arrays: of any shapes and dtypes.
        dtypes: the dtype that each has on the device; its values fit.
        device: for the tensors.

    Returns:
        a tensor for each array, of its shape and the dtype asked for; they share one storage.
    """
    sizes = [array.size * dtype.itemsize for array, dtype in zip(arrays, dtypes, strict=True)]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=devices.HAS_CUDA)
    for view, array in zip(_views(buffer, arrays, dtypes, sizes, starts), arrays, strict=True):
        np.copyto(view.numpy(), array, casting="same_kind")
    return _views(buffer.to(device, non_blocking=True), arrays, dtypes, sizes, starts)


def copy_for_later(value: Tensor) -> Tensor:
    """Copy a value to the host without waiting: its content is there when the host has next waited for the device.

    Args:
        value: on the device, of any shape and dtype.
    """
    if value.device.type == "cpu":
        return value
    return torch.empty_like(value, device="cpu", pin_memory=devices.HAS_CUDA).copy_(value, non_blocking=True)


def _views(
    buffer: Tensor,
    arrays: Sequence[np.ndarray],
    dtypes: Sequence[torch.dtype],
    sizes: Sequence[int],
    starts: Sequence[int],
) -> list[Tensor]:
    """The arrays' parts of a buffer of bytes, as tensors of their shapes."""
    return [
        buffer[start : start + size].view(dtype).view(array.shape)
        for array, dtype, size, start in zip(arrays, dtypes, sizes, starts, strict=False)
    ]

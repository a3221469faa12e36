"""Peak memory of a call: of the GPU, or of this process."""

from collections.abc import Callable
from pathlib import Path

import torch

from mft_megatron.mcore.platform import devices


def peak_memory_of(call: Callable[[], object]) -> int:
    """Bytes that a call needs at its peak in addition to what is in use before.

    On a GPU memory that torch has allocated; otherwise resident memory (Linux), best measured in a fresh process.
    """
    if devices.HAS_CUDA:
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        call()
        return torch.accelerator.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

"""Peak memory of a call: of the GPU, or of this process."""

from collections.abc import Callable
from pathlib import Path

import torch

from mft_megatron.mcore.platform import devices

from .clocks import resident_bytes


def peak_memory_of(call: Callable[[], object]) -> int:
    """Bytes that a call needs at its peak in addition to what is in use before.

    On a GPU memory that torch has allocated; otherwise resident memory (Linux), best measured in a fresh process.
    """
    if devices.HAS_CUDA:
        # torch.accelerator counts memory only since torch 2.9
        counts = torch.cuda  # noqa: TID251
        counts.reset_peak_memory_stats()
        before = counts.memory_allocated()
        call()
        return counts.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before

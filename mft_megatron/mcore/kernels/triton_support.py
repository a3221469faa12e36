"""Whether kernels written in Triton can be compiled and launched by this process.

A CUDA build of torch brings Triton, but Triton compiles a part of each launch with a C compiler and Python's headers,
which a node may not have.
"""

import functools

import torch

from mft_megatron.mcore.platform import devices


def obstacle() -> str | None:
    """Say in a line why Triton's kernels cannot run; ``None`` where they can, which holds for a simulated GPU.

    The first call launches a kernel; ask before a run starts, so that it starts without Triton instead of failing in
    its first step.
    """
    device = devices.device()
    if device.type == "meta":
        return None
    return _trial(device) if devices.HAS_CUDA else "there is no GPU"


@functools.cache
def _trial(device: torch.device) -> str | None:
    try:
        from .rotary_triton import launch

        value = torch.zeros(1, 1, 2, device=device)
        launch(value, torch.empty_like(value), value[0, :, :1], value[0, :, :1], False, False)
    except Exception as error:  # an ImportError, a missing compiler, a driver that is too old, ...
        first = (str(error).strip() or "no message").splitlines()[0][:200]
        return f"{type(error).__name__}: {first}"
    return None

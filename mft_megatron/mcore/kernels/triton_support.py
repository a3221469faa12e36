"""Whether kernels written in Triton can be compiled and launched by this process.

A CUDA build of torch brings Triton, but Triton compiles a part of each launch with a C compiler and Python's headers,
which a node may not have.
"""

import functools

import torch

from mft_megatron.errors import in_a_line

# why another process of the run does without Triton
_elsewhere: str | None = None


def do_without(reason: str | None) -> None:
    """Let this process do without Triton on a GPU, for a reason, as another one does; or not, with ``None``."""
    global _elsewhere
    _elsewhere = reason


def obstacle(device: torch.device) -> str | None:
    """Say in a line why Triton's kernels cannot run on a device; ``None`` where they can, as on a simulated GPU.

    The first call launches a kernel, so that a run without a compiler does without Triton instead of failing.
    """
    if device.type == "meta":
        return None
    return (_elsewhere or _trial(device)) if device.type == "cuda" else "there is no GPU"


@functools.cache
def _trial(device: torch.device) -> str | None:
    try:
        from .rotary_triton import launch

        value = torch.zeros(1, 1, 2, device=device)
        launch(value, torch.empty_like(value), value[0, :, :1], value[0, :, :1], False, False)
    except Exception as error:  # an ImportError, a missing compiler, a driver that is too old, ...
        return in_a_line(error)
    return None

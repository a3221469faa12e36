"""Torch's flight recorder: the last collectives of this process, which show on which one a run hangs."""

import os
from collections.abc import MutableMapping

import torch.distributed as dist
from torch._C import _distributed_c10d

# collectives that are kept
ENTRIES = "2000"
# the variable of newer releases, and that of older ones
VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")


def keep(environment: MutableMapping[str, str]) -> None:
    """Let the process groups record their last collectives; before they are made. A value of the user's stays.

    The variable got its newer name with the function that returns what gloo's groups record.
    """
    if not any(name in environment for name in VARIABLES):
        environment[VARIABLES[0 if hasattr(_distributed_c10d, "_dump_fr_trace") else 1]] = ENTRIES


def recorded() -> bytes | None:
    """Return the last collectives of this process as torch pickles them; ``None`` where nothing records them."""
    if not any(name in os.environ for name in VARIABLES):
        return None
    of_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    dump = getattr(_distributed_c10d, "_dump_nccl_trace" if of_nccl else "_dump_fr_trace", None)
    content: bytes | None = None if dump is None else dump()
    return content

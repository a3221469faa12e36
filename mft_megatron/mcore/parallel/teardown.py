"""The end of the process groups: in order on all ranks, or after an error on this one, while others may go on."""

import atexit
import faulthandler
import sys

import torch.distributed as dist
from torch.distributed import distributed_c10d

# until a process that cannot end its communicators after an error is ended
SECONDS = 30


def end_after_error() -> bool:
    """Abort the communicators of NCCL when this process exits, so that the error is printed first.

    Ending them in order waits for the other ranks, which wait for this one in a collective. Even an abort may hang, and
    the launcher ends the other ranks only when this process has exited: so it exits in any case.

    Returns:
        whether they are ended so; otherwise the caller ends the groups, which waits for nobody.
    """
    if dist.get_backend() != "nccl" or dist.get_world_size() == 1:
        return False
    atexit.register(_abort)
    return True


def _abort() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # a thread below Python, which ends the process also where an extension keeps the interpreter's lock
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    distributed_c10d._abort_process_group(dist.group.WORLD)

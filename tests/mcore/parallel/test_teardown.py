"""After an error the cause is printed first, and the process ends even where NCCL hangs."""

import time

from tests.ranks import run_tool

# a world of two ranks with NCCL as far as the end of it asks; the abort of its communicators hangs
SCRIPT = """
import sys, time, torch.distributed as dist
from torch.distributed import distributed_c10d
from mft_megatron.arguments.groups.distributed import DistributedArguments
from mft_megatron.errors import InputError, run_command
from mft_megatron.mcore.parallel import process_groups, teardown

def hang(group):
    assert group is dist.group.WORLD
    print("aborting", file=sys.stderr, flush=True)
    time.sleep(60 * float(sys.argv[1]))

def main():
    with process_groups.process_groups(DistributedArguments(), seed=1):
        dist.get_backend, dist.get_world_size = lambda: "nccl", lambda: 2
        dist.destroy_process_group = None  # it would wait for the other rank
        distributed_c10d._abort_process_group, teardown.SECONDS = hang, float(sys.argv[2])
        raise InputError("the cause")

sys.exit(run_command(main))
"""


def _end(minutes, patience):
    since = time.monotonic()
    process = run_tool("-c", SCRIPT, str(minutes), str(patience), timeout=50)
    assert time.monotonic() - since < 50
    # a build of torch for CUDA may say first that there is none
    lines = process.stderr[process.stderr.index("error:") :].splitlines()
    assert lines[:2] == ["error: the cause", "aborting"]
    return process.returncode, lines[2:]


def test_the_cause_is_printed_before_communicators_are_aborted():
    assert _end(0, 30) == (2, [])


def test_a_hanging_abort_ends_the_process():
    code, lines = _end(1, 0.5)
    assert code not in (0, None)
    assert any("in hang" in line for line in lines)  # where it hangs

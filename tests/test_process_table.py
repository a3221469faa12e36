"""The kernel's table of processes: entries of this process and of one that has ended."""

import os
import subprocess
import sys

import pytest

from mft_megatron import process_table

pytestmark = pytest.mark.skipif(not process_table.is_shown(), reason="needs Linux's /proc")


def test_a_process_is_looked_up_whatever_its_name_contains(tmp_path):
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to(sys.executable)
    code = "import sys; print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([program, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    entry = process_table.look_up(process.pid)
    assert (entry.parent, entry.ended) == (os.getpid(), False)
    assert entry.started >= process_table.look_up(os.getpid()).started
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process_table.look_up(process.pid) == entry._replace(state="Z")
    assert process_table.look_up(process.pid).ended
    process.wait()
    process.stdout.close()
    assert process_table.look_up(process.pid) is None

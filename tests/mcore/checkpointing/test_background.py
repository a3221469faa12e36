"""A process behind a rank: it sees the memory as it was, tells its result or its error, and outlives nothing."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from mft_megatron.mcore.checkpointing.writers.background import Background
from tests.ranks import ROOT


def test_it_works_with_what_was_in_the_memory():
    values = [1]

    def work():
        time.sleep(0.1)
        return values, "x" * 10**6  # more than a pipe holds

    background = Background(work)
    values.append(2)
    assert not background.ended
    assert background.result() == ([1], "x" * 10**6)
    assert background.ended


def test_its_error_is_raised_here():
    def fail():
        raise OSError(errno.ENOSPC, "full", "/run/file")

    with pytest.raises(OSError, match="full") as error:
        Background(fail).result()
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/run/file")


def test_an_error_that_cannot_be_pickled_is_told():
    class LocalError(Exception):
        pass

    def fail():
        raise LocalError("why")

    with pytest.raises(RuntimeError, match="LocalError: why"):
        Background(fail).result()


def test_a_process_that_dies_is_an_error():
    background = Background(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError, match="ended with status -9"):
        background.result()


def test_signals_on_which_a_rank_leaves_do_not_end_it():
    background = Background(lambda: time.sleep(0.3) or "done")
    time.sleep(0.1)
    os.kill(background._process, signal.SIGTERM)
    assert background.result() == "done"


KILLED = """
import mft_megatron.mcore.platform.patched
import os, signal, sys, time
from mft_megatron.mcore.checkpointing.writers.background import Background
background = Background(lambda: time.sleep(60))
print(background._process, flush=True)
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_it_ends_with_the_rank_and_holds_no_pipe():
    """Reading the rank's output to its end would take a minute if the process behind held it."""
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert ended.returncode == -signal.SIGKILL
    process = int(ended.stdout)
    while os.path.exists(f"/proc/{process}") and time.monotonic() < start + 40:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{process}")

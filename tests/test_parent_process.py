"""Processes that end with their parent: trees of processes whose first one is killed."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mft_megatron import launcher, parent_process

ROOT = Path(__file__).parent.parent
READY = "import os, sys, time; os.write(int(sys.argv[1]), b'.')"
WAIT = "time.sleep(60)"
TIED = "from mft_megatron import parent_process as p"
# what the last process of a tree does before it is ready
ENDS = {
    "a child": f"{TIED}; p.end_with_parent(); {READY}; {WAIT}",
    "a child that its parent's thread started": f"{TIED}; p.end_with_parent(); {READY}; {WAIT}",
    "a child that cleans up": (
        f"{TIED}; import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(os.write(int(sys.argv[1]), b'c'))); "
        f"p.end_as_told(); {READY}; {WAIT}"
    ),
    "a child that ignores SIGTERM": (
        f"{TIED}; import signal; p._GRACE = 0.5; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"p.end_with_parent(gently=True); {READY}; {WAIT}"
    ),
    "a rank below a script": f"{TIED}; import os; p.end_with_launcher(os.environ); {READY}; {WAIT}",
    "a program that knows nothing": f"{READY}; {WAIT}",
}
# how its parent starts it: the child's command is in the arguments
STARTS = {
    "a child that its parent's thread started": (
        "import subprocess, sys, threading; "
        "t = threading.Thread(target=lambda: subprocess.Popen(sys.argv[2:], pass_fds=[int(sys.argv[1])])); "
        "t.start(); t.join(); import time; time.sleep(60)"
    ),
    "a child that cleans up": (
        f"{TIED}; import os, subprocess, sys; "
        "subprocess.run(sys.argv[2:], pass_fds=[int(sys.argv[1])], env=p.told_to_end_with_this(os.environ))"
    ),
    "a program that knows nothing": (
        f"{TIED}; import subprocess, sys; "
        "subprocess.run(sys.argv[2:], pass_fds=[int(sys.argv[1])], preexec_fn=p.ask_kernel)"
    ),
}
START = "import subprocess, sys; subprocess.run(sys.argv[2:], pass_fds=[int(sys.argv[1])])"
RANK = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "7"}


class Tree:
    """A parent and its child, which hold a pipe: it is at its end when all of them have ended."""

    def __init__(self, name):
        self.pipe, writer = os.pipe()
        python = [sys.executable, "-c"]
        child = [*python, ENDS[name], str(writer)]
        if name == "a rank below a script":
            # the script is a rank by its environment; the launcher is not
            script = [*python, START, str(writer), *child]
            env = "import os, subprocess, sys; "
            command = [
                *python,
                f"{env}subprocess.run(sys.argv[2:], pass_fds=[int(sys.argv[1])], env=dict(os.environ, **{RANK}))",
                str(writer),
                *script,
            ]
        else:
            command = [*python, STARTS.get(name, START), str(writer), *child]
        self.parent = subprocess.Popen(command, pass_fds=[writer], cwd=ROOT)
        os.close(writer)

    def read(self, seconds):
        """The next bytes; empty at the end of the pipe, ``None`` if nothing comes in this time."""
        return os.read(self.pipe, 9) if select.select([self.pipe], [], [], seconds)[0] else None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_every_process_ends_when_the_first_is_killed():
    trees = {name: Tree(name) for name in ENDS}
    try:
        assert {name: tree.read(30) for name, tree in trees.items()} == dict.fromkeys(ENDS, b".")
        for tree in trees.values():
            tree.parent.kill()
        killed = time.monotonic()
        last = {name: tree.read(10) for name, tree in trees.items()}
        assert last.pop("a child that cleans up") == b"c"
        assert trees["a child that cleans up"].read(10) == b""
        assert last == dict.fromkeys(last, b"")
        assert time.monotonic() - killed < 10
    finally:
        for tree in trees.values():
            tree.parent.kill()
            tree.parent.wait()
            os.close(tree.pipe)


def test_a_process_whose_parent_is_gone_already_ends_at_once():
    code = f"{TIED}; import os; p.end_with_parent(os.getppid() + 1); print('still there')"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (-signal.SIGKILL, "")


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "2"}, None),  # started by hand, from a shell that may be left
        (RANK, "RANK"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, "SLURM_PROCID"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, None),
    ],
)
def test_which_processes_end_with_their_launcher(environment, variable, monkeypatch):
    watched = []
    monkeypatch.setattr(parent_process, "_watch", lambda links, gently: watched.append(links[0]))
    parent_process.end_with_launcher(environment)
    assert launcher.rank_variable(environment) == variable
    assert watched == ([(os.getpid(), os.getppid())] if variable else [])


def test_a_silent_process_holds_no_output():
    code = f"{TIED}; p.end_with_parent(silent=True); print('lost'); import sys; print('lost', file=sys.stderr)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_an_export_ends_with_the_rank_that_started_it():
    """The command looks at the parent that it is told of, which here is not its own."""
    command = [sys.executable, "tools/convert_checkpoint.py", "--help"]
    for parent, ends in ((os.getpid(), False), (os.getppid(), True)):
        environment = {**os.environ, "MFT_END_WITH": str(parent)}
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (process.returncode != 0, "mcore-to-hf" not in process.stdout) == (ends, ends)

"""Files that are cut off while they are mapped: an error of one line, where SIGBUS would end the process."""

import ast
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mft_megatron.data import _mapped_files
from mft_megatron.data.storage.mapped_files import readable, watched
from mft_megatron.errors import InputError
from tests.ranks import ROOT

PAGE = 4096


@pytest.fixture(autouse=True)
def no_map_is_left():
    """A file that cannot be read is reported as long as it is mapped: tracebacks must not keep it for other tests."""
    yield
    gc.collect()


# what a process does to a file that it has mapped; each part ends it, and is told apart by its output and exit code
PROCESS = """
import faulthandler, os, signal, sys
import numpy as np
from mft_megatron.data.storage.mapped_files import readable, watched
from mft_megatron.errors import run_command

path, part = sys.argv[1:]
if part == "after faulthandler":
    faulthandler.enable()
if part != "not watched":
    array = watched(np.memmap(path, np.uint8, "r"), path)
else:
    array = np.memmap(path, np.uint8, "r")
    other = watched(np.memmap(sys.argv[0] if os.path.isfile(sys.argv[0]) else "setup.py", np.uint8, "r"), "setup.py")
if part == "before faulthandler":
    faulthandler.enable()
os.truncate(path, 4096)

def touch():
    print("sum", int(array[4096:].sum()), flush=True)

def guarded():
    with readable():
        touch()

if part == "guarded":
    sys.exit(run_command(guarded))
touch()
"""


def run(tmp_path, part):
    file = tmp_path / "items.bin"
    file.write_bytes(bytes([1]) * 5 * PAGE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROCESS, str(file), part]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    return file, process


def test_a_file_that_is_cut_off_is_named_where_nothing_guards(tmp_path):
    file, process = run(tmp_path, "unguarded")
    said = f"error: {file}: was cut off while it was read; restore it, or preprocess the data again\n"
    assert (process.returncode, process.stderr, process.stdout) == (2, said, "")


def test_a_guarded_block_ends_in_an_error(tmp_path):
    file, process = run(tmp_path, "guarded")
    said = f"error: {file}: was cut off or replaced while it was read, and has {PAGE} bytes now; restore it, or"
    assert process.returncode == 2
    assert process.stderr.startswith(said)
    assert process.stdout == "sum 0\n"  # zeros, which the end of the block reports


@pytest.mark.parametrize("part", ["before faulthandler", "after faulthandler"])
def test_with_faulthandler_the_file_is_named_too(tmp_path, part):
    """Python's own handler, which others may have turned on, writes a traceback first where it is the newer one."""
    file, process = run(tmp_path, part)
    assert process.returncode == 2
    assert f"error: {file}: was cut off while it was read" in process.stderr
    assert ("Fatal Python error: Bus error" in process.stderr) == (part == "before faulthandler")


def test_any_other_bus_error_ends_the_process_as_before(tmp_path):
    _, process = run(tmp_path, "not watched")
    assert process.returncode == -7
    assert process.stderr == ""


@readable()
def _read_both(cut_off, whole):
    with readable():
        assert whole[-1] == 7
    assert cut_off[-1] == 0
    raise IndexError("from zeros")


def test_in_one_process(tmp_path):
    """Blocks nest; the file stays unreadable while it is mapped, and others can be read."""
    paths = [tmp_path / name for name in ("first", "second")]
    for path in paths:
        path.write_bytes(bytes([7]) * 3 * PAGE)
    maps = [watched(np.memmap(path, np.uint8, "r"), path) for path in paths]
    with readable(), readable():
        assert maps[0].sum() == 7 * 3 * PAGE
    os.truncate(paths[0], PAGE)
    with pytest.raises(InputError, match=r"first: was cut off .* has 4096 bytes now") as caught:
        _read_both(*maps)
    assert caught.value.always
    del caught  # its traceback holds the map
    with pytest.raises(InputError, match="first"), readable():
        pass
    del maps[0]
    gc.collect()
    with readable():
        assert maps[0][-1] == 7


def test_maps_that_are_gone_are_watched_no_more(tmp_path):
    path = tmp_path / "items"
    path.write_bytes(bytes(PAGE))
    for _ in range(5000):
        part = watched(np.memmap(path, np.uint8, "r"), path)[10:20]  # a view keeps the map
    assert part.sum() == 0
    assert watched(np.zeros(3), path).sum() == 0
    with pytest.raises(ValueError, match="0 bytes"):
        _mapped_files.watch(1, 0, 0, "x")
    with pytest.raises(ValueError, match="number 4095"):
        _mapped_files.release(4095)
    with pytest.raises(RuntimeError, match="no block"):
        _mapped_files.leave_guard()


def test_the_stub_describes_the_module():
    stub = Path(_mapped_files.__file__).with_name("_mapped_files.pyi")
    functions = {node.name for node in ast.parse(stub.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert functions == {name for name in vars(_mapped_files) if not name.startswith("_")}

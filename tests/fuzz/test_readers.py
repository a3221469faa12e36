"""Damaged files are read or refused in a line: no traceback, no endless loop, no memory for what is not there.

``FUZZ_ROUNDS`` and ``FUZZ_SEED`` in the environment say how many files of each reader are damaged, and from which seed.
"""

import os
import resource
import shutil
import signal
import zlib

import pytest

from mft_megatron.errors import InputError
from tests.fuzz.damage import damaged
from tests.fuzz.readers import READERS

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "15"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = 20
# more than this process has mapped
MEMORY = 3 << 30


class _TooLong(BaseException):
    """The read takes too long; no handler of errors may catch it."""


@pytest.fixture
def limited():
    """Limit the memory of this process."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _stop(number, frame):
    raise _TooLong


def _attempt(read, folder):
    """Read a folder; returns the message of a refusal."""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        read(folder)
    except InputError as error:
        return str(error)
    finally:
        signal.alarm(0)
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name, tokenizer_folder, tmp_path, capsys, limited):
    reader = READERS[name]
    whole = tmp_path / "whole"
    whole.mkdir()
    reader.make(whole, tokenizer_folder)
    shutil.copytree(whole, tmp_path / "copy")
    assert _attempt(reader.read, tmp_path / "copy") is None, "the whole files are refused"
    shutil.rmtree(tmp_path / "copy")
    files = sorted(path.relative_to(whole) for path in whole.glob(reader.files) if path.is_file())
    assert files
    refused = 0
    for number in range(ROUNDS):
        seed = zlib.crc32(name.encode()) + SEED + number
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        file = folder / files[(SEED + number) % len(files)]
        file.write_bytes(damaged(file.read_bytes(), seed))
        try:
            message = _attempt(reader.read, folder)
        except BaseException as error:
            kept = tmp_path / "kept"
            shutil.copytree(folder, kept)
            where = f"{name}, FUZZ_SEED={SEED + number} (file {file.name}, kept in {kept})"
            pytest.fail(f"{where}: {type(error).__name__}: {error}")
        refused += message is not None
        assert message is None or message.strip()
        shutil.rmtree(folder)
    assert refused or ROUNDS < 60, "damage is never noticed"

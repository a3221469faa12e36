"""Files that are hashed while they are written: the same hashes as of the whole content, whatever the writes."""

import io
import json
import random

import pytest
import xxhash

from mft_megatron.run_folder import file_hash, manifest
from mft_megatron.run_folder.file_hash import FileHash, Hasher, create_hashed, hash_file, read_blocks, write_hashed
from mft_megatron.run_folder.manifest import DamagedCheckpointError, read_manifest, write_manifest
from mft_megatron.run_folder.names import MANIFEST


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(file_hash, "PIECE_BYTES", 1000)
    monkeypatch.setattr(file_hash, "_BLOCK_BYTES", 300)


def pieces_of(content):
    """The reference: the hash of each 1000 bytes."""
    pieces = [content[begin : begin + 1000] for begin in range(0, len(content), 1000)]
    return FileHash(len(content), tuple(xxhash.xxh3_128_hexdigest(piece) for piece in pieces))


@pytest.mark.parametrize("size", [0, 1, 299, 300, 999, 1000, 1001, 2000, 12345])
def test_hashes_do_not_depend_on_the_writes(tmp_path, size):
    draw = random.Random(size)
    content = draw.randbytes(size)
    hasher = Hasher()
    buffer, file = create_hashed(tmp_path / "a")
    with buffer:
        position = 0
        while position < size:
            part = content[position : position + draw.choice((1, 7, 250, 301, 1700))]
            assert buffer.write(memoryview(part)) == len(part)
            hasher.update(part)
            position += len(part)
            assert buffer.tell() == position
    assert write_hashed(tmp_path / "b", content) == pieces_of(content)
    assert file.result() == hasher.result() == hash_file(tmp_path / "a") == pieces_of(content)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == content
    parts = (b"".join(map(bytes, read_blocks(tmp_path / "a", file.result().piece(number)))) for number in range(13))
    assert b"".join(parts) == content


def test_a_file_that_is_hashed_is_written_from_its_beginning_to_its_end(tmp_path):
    buffer, _ = create_hashed(tmp_path / "a")
    with buffer:
        buffer.write(b"abc")
        for change in (lambda: buffer.seek(1), lambda: buffer.truncate(1)):
            with pytest.raises(io.UnsupportedOperation):
                change()
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_a_manifest_gives_back_what_was_written(tmp_path):
    files = {"b": FileHash(0, ()), 'a "quoted"': pieces_of(b"x" * 2500), "ä": pieces_of(b"y")}
    expected = write_manifest(tmp_path, files)
    assert read_manifest(tmp_path, expected) == files
    text = (tmp_path / MANIFEST).read_bytes()
    assert len(text.splitlines()) == len(files) + 2
    for position in range(len(text)):
        changed = bytearray(text)
        changed[position] ^= 1 << position % 8
        (tmp_path / MANIFEST).write_bytes(changed)
        with pytest.raises(DamagedCheckpointError, match="damaged, or of another checkpoint"):
            read_manifest(tmp_path, expected)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"its file {MANIFEST} is missing"):
        read_manifest(tmp_path, expected)


def test_a_manifest_of_another_algorithm_is_refused(tmp_path):
    expected = write_manifest(tmp_path, {})
    table = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**table, "hash": "md5"}))
    with pytest.raises(Exception, match=r"md5 of \d+ bytes is not known to this program"):
        read_manifest(tmp_path, file_hash.digest((tmp_path / MANIFEST).read_bytes()))
    assert manifest.read_manifest(tmp_path, write_manifest(tmp_path, {})) == {}
    assert expected == file_hash.digest((tmp_path / MANIFEST).read_bytes())

"""A checkpoint's files are compared with their hashes: every changed byte is found."""

import dataclasses
import json
import random
import shutil

import pytest

from mft_megatron.errors import InputError
from mft_megatron.exit_codes import DAMAGED
from mft_megatron.run_folder import file_hash, verification
from mft_megatron.run_folder.description import description_text, read_info, write_info
from mft_megatron.run_folder.found import checkpoint_of, latest_checkpoint, newest_or_earlier
from mft_megatron.run_folder.manifest import DamagedCheckpointError, read_manifest
from mft_megatron.run_folder.names import INFO, MANIFEST
from mft_megatron.run_folder.verification import AUTO, FULL, LEVELS, OFF, SIZES, prepare, verify
from tests.descriptions import description_of
from tests.saved_checkpoints import write_small


@pytest.fixture
def path(tmp_path):
    return write_small(tmp_path / "run", 10)


def check(path, level=AUTO):
    return verify(path, read_info(path), level)


def damage_of(path, level=AUTO):
    with pytest.raises(DamagedCheckpointError) as caught:
        check(path, level)
    assert caught.value.code == DAMAGED
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_of_100_flipped_bytes_is_found(path):
    """At random offsets of files that are chosen by size, and of each kind of file."""
    draw = random.Random(7)
    names = sorted(file.name for file in path.iterdir())
    assert len(names) == 10
    sizes = [(path / name).stat().st_size for name in names]
    for name in [*draw.choices(names, sizes, k=60), *(name for name in names for _ in range(4))]:
        before = (path / name).read_bytes()
        changed = bytearray(before)
        changed[draw.randrange(len(changed))] ^= draw.randrange(1, 256)
        (path / name).write_bytes(changed)
        with pytest.raises(InputError) as caught:
            check(path)
        assert name in str(caught.value), (name, str(caught.value))
        (path / name).write_bytes(before)
    assert check(path).startswith(f"{path}: whole: its 8 files, 0.00 GB, have their hashes, read in ")


@pytest.mark.parametrize("level", [AUTO, FULL, SIZES])
def test_lengths_are_compared(path, level):
    file = path / "__2_0.distcp"
    content = file.read_bytes()
    size = f"{len(content):,}"
    file.write_bytes(content + b"\0")
    assert f"its file {file.name} is too long: {len(content) + 1:,} of {size} bytes are there" in damage_of(path, level)
    file.write_bytes(content[:-1])
    assert f"is cut off: {len(content) - 1:,} of {size} bytes are there" in damage_of(path, level)
    file.unlink()
    assert damage_of(path, level) == f"{path}: its file {file.name} is missing"
    file.mkdir()
    assert f"its file {file.name} " in damage_of(path, level)


def test_levels_say_what_they_compare(path):
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[50] ^= 1
    (path / "__0_0.distcp").write_bytes(content)
    for level in (AUTO, FULL):
        assert f"__0_0.distcp is damaged: bytes 0 to {len(content) - 1:,} have another hash" in damage_of(path, level)
    assert check(path, SIZES).endswith("have their sizes; contents were not read (--verify-checkpoint sizes)")
    assert check(path, OFF) == f"{path}: its files were not compared with their hashes (--verify-checkpoint off)"


def test_pieces_of_large_checkpoints_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(file_hash, "PIECE_BYTES", 100)
    for module in (verification, __import__("mft_megatron.run_folder.manifest", fromlist=["x"])):
        monkeypatch.setattr(module, "PIECE_BYTES", 100)
    monkeypatch.setattr(verification, "AUTO_BYTES", 15000)
    path = write_small(tmp_path, 10)
    info = read_info(path)
    everything = {
        (name, number)
        for name, file in read_manifest(path, info.manifest).items()
        for number in range(len(file.pieces))
    }
    small = {piece for piece in everything if piece[0] in (".metadata", "common.pt", "metadata.json")}
    drawn = [set(prepare(path, info, AUTO, 1, seed).pieces) for seed in range(30)]
    assert all(len(pieces) == 150 and small < pieces for pieces in drawn)
    assert set.union(*drawn) == everything > drawn[0] != drawn[1]
    assert set(prepare(path, info, FULL, 1, 0).pieces) == everything == set(prepare(path, info, AUTO, 100, 0).pieces)
    line = check(path)
    assert "and 150 pieces at random their hashes, 0.00 GB read in" in line
    assert line.endswith("--verify-checkpoint full reads all")
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[1234] ^= 1
    (path / "__0_0.distcp").write_bytes(content)
    assert "bytes 1,200 to 1,299 have another hash" in damage_of(path, FULL)


def test_processes_share_all_files_and_pieces(path, monkeypatch):
    monkeypatch.setattr(file_hash, "PIECE_BYTES", 100)
    seen = []
    monkeypatch.setattr(verification.Comparison, "_wrong_size", lambda self, name: seen.append(name))
    monkeypatch.setattr(verification.Comparison, "_wrong_piece", lambda self, piece: seen.append(piece))
    comparison = dataclasses.replace(prepare(path, read_info(path), FULL), pieces=[("a", n) for n in range(11)])
    for process in range(3):
        assert comparison.find_damage(process, 3) is None
    assert sorted(map(str, seen)) == sorted(map(str, [*comparison.files, *comparison.pieces]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["consumed_samples", "seed", "dataset_hash", "order_version"])
def test_an_edited_description_is_found(path, level, name):
    text = (path / INFO).read_text()
    value = json.loads(text)[name]
    other = "x" if isinstance(value, str) else value + 1
    (path / INFO).write_text(text.replace(f'"{name}": {json.dumps(value)}', f'"{name}": {json.dumps(other)}'))
    assert "changed since it was written" in damage_of(path, level)
    (path / INFO).write_text(description_text(description_of(path / INFO)))  # the digest is right again
    assert f"its description says {name} = {other!r}, its common.pt {value!r}; the description was" in damage_of(
        path, level
    )


@pytest.mark.parametrize(
    "names", [(INFO,), (MANIFEST,), (INFO, MANIFEST), ("common.pt",), (".metadata",), ("__0_0.distcp",)]
)
def test_files_of_two_checkpoints_are_found(path, names):
    other = write_small(path.parent, 20)
    for name in names:
        shutil.copy(other / name, path / name)
    line = damage_of(path)
    assert any(
        words in line for words in ("files of two checkpoints", "of another checkpoint", "another hash", "cut off")
    )


def test_an_older_checkpoint_has_no_hashes(path):
    info = dataclasses.replace(read_info(path), format_version=3, manifest="")
    write_info(path, info)
    (path / MANIFEST).unlink()
    assert (
        check(path) == f"{path}: has no hashes, as an older version wrote it; its files are as long as its index needs"
    )
    (path / "__0_0.distcp").write_bytes(b"")
    assert "its file __0_0.distcp is cut off" in damage_of(path)


def test_a_damaged_description_of_the_newest_is_named_and_the_one_before_found(tmp_path):
    paths = [write_small(tmp_path, iteration) for iteration in (10, 20, 30, 40)]
    assert newest_or_earlier(tmp_path).path == paths[3]
    assert newest_or_earlier(paths[3]).instead_of == ()
    (paths[3] / INFO).write_text("{")
    (paths[2] / INFO).unlink()
    shutil.copytree(paths[1], tmp_path / "iter_0000035_copy")
    found = newest_or_earlier(tmp_path)
    assert found.path == paths[1]
    assert [reason.split(": ")[0] for reason in found.instead_of] == [f"{paths[3] / INFO}", f"--load {paths[2]}"]
    for call in (
        lambda: latest_checkpoint(tmp_path),
        lambda: newest_or_earlier(paths[3]),
        lambda: checkpoint_of(tmp_path, 40),
    ):
        with pytest.raises(DamagedCheckpointError, match="iter_0000020 has all its files: give"):
            call()
    shutil.rmtree(paths[3])
    assert newest_or_earlier(tmp_path).path == paths[1]
    for path in paths[:2]:
        (path / INFO).unlink()
    with pytest.raises(DamagedCheckpointError, match=r"names iteration 40, but .*iter_0000040 does not exist"):
        newest_or_earlier(tmp_path)


def test_a_folder_with_another_iteration_is_damaged(tmp_path):
    ten, twenty = (write_small(tmp_path, iteration) for iteration in (10, 20))
    shutil.rmtree(twenty)
    shutil.copytree(ten, twenty)
    with pytest.raises(DamagedCheckpointError, match="iter_0000020: its description is that of iteration 10; "):
        latest_checkpoint(tmp_path)
    assert newest_or_earlier(tmp_path).path == ten

"""Damage of a checkpoint's files is named, with the newest whole checkpoint beside it and how to load that."""

import json
import pickle
import shutil
import zipfile

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from mft_megatron.errors import InputError
from mft_megatron.run_folder.files import damage, remedy
from mft_megatron.run_folder.found import checkpoint_of, latest_checkpoint
from mft_megatron.run_folder.names import INFO, TRACKER
from tests.arguments.command_line import checkpoint


def whole(folder, iteration=5):
    """Write a checkpoint of two files, which hold 100 and 30 bytes, and return its folder."""
    path = folder / f"iter_{iteration:07d}"
    if iteration == 5:
        checkpoint(folder)
    else:
        shutil.copytree(folder / "iter_0000005", path)
        return path
    # an index is in no order of places
    stored = {("a", 1): ("__0_0.distcp", 60, 40), ("a", 0): ("__0_0.distcp", 0, 60), ("b", 0): ("__1_0.distcp", 0, 30)}
    index = {MetadataIndex(name, (row,)): _StorageInfo(*where) for (name, row), where in stored.items()}
    (path / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data=index)))
    (path / "__0_0.distcp").write_bytes(bytes(100))
    (path / "__1_0.distcp").write_bytes(bytes(30))
    (path / "metadata.json").write_text("{}")
    with zipfile.ZipFile(path / "common.pt", "w") as archive:
        archive.writestr("x", "")
    return path


def cut(size):
    return lambda file: file.write_bytes(file.read_bytes()[:size])


DAMAGE = {
    "nothing": (None, None, None),
    "a file": ("__1_0.distcp", lambda file: file.unlink(), "its file __1_0.distcp is missing"),
    "an end": ("__0_0.distcp", cut(99), "its file __0_0.distcp is cut off: 99 of 100 bytes are there"),
    "all of it": ("__0_0.distcp", cut(0), "its file __0_0.distcp is cut off: 0 of 100 bytes are there"),
    "the index": (".metadata", lambda file: file.unlink(), "its index .metadata is missing"),
    "half the index": (".metadata", cut(40), "its index .metadata cannot be read ("),
    "an empty index": (".metadata", cut(0), "its index .metadata cannot be read ("),
    "another index": (
        ".metadata",
        lambda file: file.write_bytes(pickle.dumps([1])),
        "its index .metadata cannot be",
    ),
    "the format": ("metadata.json", lambda file: file.unlink(), "its file metadata.json is missing"),
    "common state": ("common.pt", cut(10), "its file common.pt is cut off"),
    "no common.pt, which may be an object": ("common.pt", lambda file: file.unlink(), None),
}


def harm(path, case):
    file, change, said = DAMAGE[case]
    if file is not None:
        change(path / file)
    return said


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path, case):
    path = whole(tmp_path)
    said = harm(path, case)
    found = damage(path)
    assert found == said if found is None or said is None else found.startswith(said)
    assert "\n" not in (found or "")


def test_the_newest_whole_checkpoint_is_named(tmp_path):
    paths = [whole(tmp_path, iteration) for iteration in (5, 10, 20, 30, 40)]
    newest = paths[-1]
    assert remedy(newest, INFO) == (
        f"iter_0000030 has all its files: give {paths[3]} instead, or with --load in training --ckpt-step 30"
    )
    harm(paths[3], "an end")
    (paths[2] / INFO).unlink()  # a save that was never finished
    assert remedy(newest, INFO).startswith("iter_0000010 has all its files: give /")
    assert remedy(newest, None).startswith("iter_0000020 has all its files: give /")
    for path in paths[:2]:
        harm(path, "a file")
    assert remedy(newest, INFO) == "none of the other checkpoints beside it has all its files"
    for path in paths[:-1]:
        shutil.rmtree(path)
    assert remedy(newest, INFO) == "there is no other checkpoint beside it"


UNUSABLE = {
    "unfinished": "was never finished",
    "damaged": "is damaged",
    "gone": "correct the number in it",
    "no number": "iter_ folder",
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_newest_checkpoint_that_cannot_be_loaded_names_the_one_before(tmp_path, case):
    before, newest = whole(tmp_path), whole(tmp_path, 10)
    (tmp_path / TRACKER).write_text("10\n")
    if case == "gone":
        shutil.rmtree(newest)
    elif case == "no number":
        (tmp_path / TRACKER).write_text("")
    elif case == "damaged":
        (newest / INFO).write_text(json.dumps({"iteration": 10})[:-3])
    else:
        (newest / INFO).unlink()
    whole_one = newest.name if case == "no number" else before.name
    calls = [lambda: latest_checkpoint(tmp_path)]
    if case in ("unfinished", "damaged"):
        calls += [lambda: latest_checkpoint(newest), lambda: checkpoint_of(tmp_path, 10)]
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        line = str(caught.value)
        there = f"{whole_one} has all its files: give {tmp_path / whole_one} instead"
        assert line.endswith(f"{UNUSABLE[case]}; {there}, or with --load in training --ckpt-step {int(whole_one[5:])}")
        assert "\n" not in line
    assert checkpoint_of(tmp_path, 5).path == latest_checkpoint(before).path == before

"""Files that name a checkpoint, and checkpoints that may be removed."""

import dataclasses
import errno
import json
import os
import shutil

import pytest

from mft_megatron.convert.commands.huggingface import mcore_to_hf
from mft_megatron.convert.huggingface.families.llama import LLAMA
from mft_megatron.errors import InputError
from mft_megatron.run_folder.description import CheckpointInfo, read_info, write_info
from mft_megatron.run_folder.found import (
    best_checkpoint,
    described_checkpoints,
    earlier_checkpoint,
    latest_checkpoint,
)
from mft_megatron.run_folder.names import BEST, INFO, TRACKER, is_checkpoint, iteration_folder
from mft_megatron.run_folder.replace_text import replace_text
from mft_megatron.run_folder.retention import not_kept, record_best, remove_checkpoint, restore_best, superseded
from tests.descriptions import description_of


def checkpoint(folder, iteration, **options):
    path = iteration_folder(folder, iteration)
    path.mkdir(parents=True)
    write_info(path, CheckpointInfo(iteration, 0, {}, 10, {}, "", 1, 8, **options))
    (folder / TRACKER).write_text(f"{iteration}\n")
    return path


def test_the_newest_and_the_best(tmp_path):
    first, second = (checkpoint(tmp_path, iteration) for iteration in (10, 20))
    record_best(tmp_path, 10)
    assert latest_checkpoint(tmp_path).path == second
    assert best_checkpoint(tmp_path).path == first
    assert best_checkpoint(str(tmp_path)).info == read_info(first)
    assert (tmp_path / BEST).read_text() == "10\n"
    assert latest_checkpoint(first).path == first
    record_best(tmp_path, 20)
    assert best_checkpoint(tmp_path).path == second
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("find", "name"), [(latest_checkpoint, TRACKER), (best_checkpoint, BEST)])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("ten", "'ten' is not an iteration number; write the number of an existing iter_ folder"),
        ("-1", "'-1' is not an iteration number"),
        ("", "'' is not an iteration number"),
        ("30", "names iteration 30, but .*iter_0000030 does not exist; correct the number in it"),
        ("20", "this save was never finished"),
    ],
)
def test_a_damaged_file_with_an_iteration_is_refused(tmp_path, find, name, content, text):
    checkpoint(tmp_path, 10)
    iteration_folder(tmp_path, 20).mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=text) as error:
        find(tmp_path, "--from")
    assert "\n" not in str(error.value)


def test_a_folder_without_such_a_file_is_refused(tmp_path):
    path = checkpoint(tmp_path, 10)
    with pytest.raises(InputError, match=f"--from .*: has no {BEST}, so no best checkpoint was kept there; give the"):
        best_checkpoint(tmp_path, "--from")
    with pytest.raises(InputError, match=f"iter_0000010: has no {BEST}"):
        best_checkpoint(path)
    with pytest.raises(InputError, match=r"--load .*nothing: does not exist; give the folder of a run that kept one"):
        best_checkpoint(tmp_path / "nothing")
    (tmp_path / TRACKER).unlink()
    (path / INFO).unlink()
    with pytest.raises(
        InputError, match=f"has no {TRACKER}, so no checkpoint was completed there; .* leave --from out"
    ):
        latest_checkpoint(tmp_path, "--from")
    with pytest.raises(InputError, match="does not exist; give a folder that --save wrote"):
        latest_checkpoint(tmp_path / "nothing")


def test_a_lost_tracker_is_named_unless_there_is_one_checkpoint_alone(tmp_path):
    """The first save of a run may be interrupted between the checkpoint's name and the tracker."""
    first = checkpoint(tmp_path, 10)
    (tmp_path / TRACKER).unlink()
    iteration_folder(tmp_path, 20).mkdir()  # unfinished
    assert is_checkpoint(tmp_path)
    assert latest_checkpoint(tmp_path).path == first
    iteration_folder(tmp_path, 20).rmdir()
    shutil.copytree(checkpoint(tmp_path, 20), tmp_path / "iter_0000020.bak")
    (tmp_path / TRACKER).unlink()
    assert is_checkpoint(tmp_path)
    lost = f"--from {tmp_path}: its file {TRACKER}, which names the newest checkpoint, is lost"
    remedy = f"(iter_0000010, iter_0000020); write the number .*: echo 20 > {tmp_path / TRACKER}"
    with pytest.raises(InputError, match=f"{lost}.*{remedy}".replace("(", r"\(").replace(")", r"\)")):
        latest_checkpoint(tmp_path, "--from")


def test_a_description_without_the_newer_fields_can_be_read(tmp_path):
    path = checkpoint(tmp_path, 10)
    content = description_of(path / INFO)
    del content["best"], content["asked_for"], content["order_version"]
    content["format_version"] = 2
    (path / INFO).write_text(json.dumps(content))
    info = read_info(path)
    assert (info.best, info.asked_for, info.order_version) == (False, True, 1)
    assert dataclasses.asdict(info) == {**content, "best": False, "asked_for": True, "order_version": 1}


def test_only_checkpoints_saved_as_the_best_are_superseded(tmp_path):
    only_best = {"best": True, "asked_for": False}
    checkpoint(tmp_path, 30, best=True)
    checkpoint(tmp_path, 40)
    for iteration in (10, 20, 50, 60):
        checkpoint(tmp_path, iteration, **only_best)
    record_best(tmp_path, 20)
    assert latest_checkpoint(tmp_path).info.iteration == 60
    assert superseded(tmp_path) == [iteration_folder(tmp_path, iteration) for iteration in (10, 50)]


def test_a_damaged_best_checkpoint_is_none_and_keeps_no_run_from_going_on(tmp_path):
    paths = [checkpoint(tmp_path, iteration, best=True) for iteration in (10, 20, 30, 40)]
    restore_best(tmp_path, 20)
    assert best_checkpoint(tmp_path).path == paths[1]
    assert not_kept(tmp_path, 1, None) == [paths[0], paths[2]]
    (paths[1] / INFO).write_text("{")
    assert not_kept(tmp_path, 1, None) == [paths[0], paths[2]]
    restore_best(tmp_path, 20)
    assert not (tmp_path / BEST).exists()


def test_other_files_and_folders_are_never_superseded(tmp_path):
    old = checkpoint(tmp_path, 10, best=True, asked_for=False)
    elsewhere = tmp_path / "elsewhere"
    linked = checkpoint(elsewhere, 20, best=True, asked_for=False)
    iteration_folder(tmp_path, 20).symlink_to(linked)
    copy = tmp_path / "iter_0000010_copy"
    copy.mkdir()
    (copy / INFO).write_text((old / INFO).read_text())
    (tmp_path / "iter_notes.txt").write_text("")
    iteration_folder(tmp_path, 30).mkdir()
    damaged = iteration_folder(tmp_path, 40)
    damaged.mkdir()
    (damaged / INFO).write_text("{")
    checkpoint(tmp_path, 50)
    record_best(tmp_path, 50)
    assert superseded(tmp_path) == [old]


def test_an_interrupted_removal_leaves_no_checkpoint(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, 10)
    (path / "weights").write_text("")

    def fail(path):
        raise OSError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", fail)
        with pytest.raises(OSError, match="broken off"):
            remove_checkpoint(path)
    assert not path.exists()
    assert [left.name.split(".")[1:3] for left in tmp_path.glob(".*")] == [["removing", path.name]]
    other = checkpoint(tmp_path, 20)
    remove_checkpoint(other)
    assert not other.exists()


@pytest.mark.parametrize(("words", "expected"), [([], 20), (["--best"], 10)])
def test_an_export_takes_the_newest_or_the_best(tmp_path, monkeypatch, words, expected):
    for iteration in (10, 20):
        checkpoint(tmp_path / "run", iteration)
    record_best(tmp_path / "run", 10)
    exported = []

    def export(checkpoint, *_):
        exported.append((checkpoint.path, checkpoint.info.iteration))
        return LLAMA, []

    monkeypatch.setattr("mft_megatron.convert.huggingface.model_export.export", export)
    folders = ["--load", str(tmp_path / "run"), "--hf", str(tmp_path / "hf")]
    mcore_to_hf([*folders, "--verify-checkpoint", "off", *words])
    assert exported == [(iteration_folder(tmp_path / "run", expected), expected)]


def test_an_export_of_the_best_is_refused_without_one(tmp_path):
    checkpoint(tmp_path / "run", 10)
    with pytest.raises(InputError, match=f"--load .*run: has no {BEST}"):
        mcore_to_hf(["--load", str(tmp_path / "run"), "--hf", str(tmp_path / "hf"), "--best"])


@pytest.mark.parametrize("name", ["iter_0000007", "release"])
def test_a_checkpoint_of_megatron_lm_is_told_from_an_unfinished_save(tmp_path, name):
    """The arguments in its common state identify it, without unpickling them."""
    import argparse

    import torch

    from mft_megatron.run_folder.found import latest_checkpoint
    from mft_megatron.run_folder.names import TRACKER

    path = tmp_path / name
    path.mkdir()
    (tmp_path / TRACKER).write_text("release" if name == "release" else "7")
    torch.save({"args": argparse.Namespace(num_layers=2), "iteration": 7}, path / "common.pt")
    with pytest.raises(
        InputError, match=rf"{name}: Megatron-LM or Megatron-Bridge wrote it; convert it first: .* megatron-to-"
    ):
        latest_checkpoint(tmp_path)
    torch.save({"iteration": 7}, path / "common.pt")
    with pytest.raises(InputError, match=r"never finished|is not an iteration number"):
        latest_checkpoint(tmp_path)
    (path / "run_config.yaml").write_text("model: {}")
    with pytest.raises(InputError, match="Megatron-Bridge wrote it"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("fault", ["write", "rename"])
def test_a_small_file_is_replaced_or_as_it_was(tmp_path, monkeypatch, fault):
    file = tmp_path / "tracker"
    replace_text(file, "5\n")

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync" if fault == "write" else "replace", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        replace_text(file, "6\n")
    assert caught.value.filename == str(file)
    assert [path.name for path in tmp_path.iterdir()] == ["tracker"]
    assert file.read_text() == "5\n"


def test_checkpoints_are_in_the_order_of_their_iterations(tmp_path):
    """Names of more than seven digits sort otherwise as text."""
    steps = (30, 9_999_999, 10_000_000)
    for step in reversed(steps):
        checkpoint(tmp_path, step)
    assert [found.info.iteration for found in described_checkpoints(tmp_path)] == list(steps)
    for step, before in zip(steps[1:], steps, strict=False):
        assert earlier_checkpoint(iteration_folder(tmp_path, step), ()).info.iteration == before
    assert earlier_checkpoint(iteration_folder(tmp_path, steps[0]), ()) is None

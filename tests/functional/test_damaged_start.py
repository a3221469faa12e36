"""A run whose newest checkpoint is damaged starts from the newest whole one, on all ranks, and says so."""

import pytest

from mft_megatron.exit_codes import DAMAGED, FINISHED
from mft_megatron.run_folder.found import latest_checkpoint
from mft_megatron.run_folder.names import INFO, iteration_folder
from tests.command_lines import SHORT_RUN
from tests.ranks import run_forked
from tests.run_records import events
from tests.saved_checkpoints import tensors_of


def change_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


@pytest.fixture(scope="module")
def run(dataset_prefix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"

    def start(*more):
        words = [
            *SHORT_RUN.split(),
            "--lr-decay-style",
            "constant",
            "--data-path",
            dataset_prefix,
            "--save",
            folder,
            "--save-interval",
            "1",
            *more,
        ]
        return run_forked("pretrain_mft.py", *words, world_size=2)

    assert start("--train-iters", "3").returncode == FINISHED
    return folder, start


def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_ones_are_named(run):
    folder, start = run
    expected = tensors_of(iteration_folder(folder, 3))
    change_byte(iteration_folder(folder, 3) / "__1_0.distcp")
    change_byte(iteration_folder(folder, 2) / INFO)
    again = start("--load", folder, "--train-iters", "4")
    assert again.returncode == FINISHED, again.stderr
    lines = [line.split("] ", 1)[-1] for line in again.stdout.splitlines()]
    damaged = [line for line in lines if line.startswith("damaged: ")]
    assert damaged[0].startswith(f"damaged: {folder}/iter_0000003: its file __1_0.distcp is damaged: bytes 0 to ")
    assert damaged[1].startswith(f"damaged: {folder}/iter_0000002/{INFO}: ")
    assert len(damaged) == 2
    assert f"{folder}/iter_0000001 is the newest whole checkpoint; the run starts from it" in lines
    assert any(line.startswith(f"{folder}/iter_0000001: whole: its ") for line in lines)
    [later] = [line for line in lines if "later checkpoints are there" in line]
    assert later.startswith(f"{folder}: the run goes on from step 1; ")
    assert later.endswith(" until it comes to their steps: iter_0000003")
    loaded = events(folder, "load")
    assert [(event["step"], event["path"]) for event in loaded] == [(1, f"{folder}/iter_0000001")]
    assert len(loaded[0]["instead_of"]) == 2
    # what is repeated replaces the damaged ones
    found = tensors_of(iteration_folder(folder, 3))
    assert all(found[name].equal(expected[name]) for name in expected)
    assert latest_checkpoint(folder).info.iteration == 4


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(run):
    folder, start = run
    change_byte(iteration_folder(folder, 1) / "__0_0.distcp")
    again = start("--load", folder, "--ckpt-step", "1", "--train-iters", "4")
    assert again.returncode == DAMAGED
    [line] = again.stderr.splitlines()
    assert line.startswith(f"error: {folder}/iter_0000001: its file __0_0.distcp is damaged: bytes 0 to ")
    assert line.endswith(f"give {folder}/iter_0000004 instead, or with --load in training --ckpt-step 4")


def test_a_finished_run_whose_last_checkpoint_was_damaged_since_has_not_ended_well(run):
    folder, start = run
    change_byte(iteration_folder(folder, 4) / "__1_0.distcp")
    again = start("--load", folder, "--train-iters", "4")
    assert again.returncode == DAMAGED
    [line] = again.stderr.splitlines()
    assert line.startswith(f"error: {folder}/iter_0000004: its file __1_0.distcp is damaged: bytes 0 to ")
    assert f"iter_0000003 has all its files: give {folder}/iter_0000003 instead" in line

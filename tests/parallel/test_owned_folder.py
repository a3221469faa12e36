"""The owner of a run folder in training: all ranks of a second run end, and so does a run that has lost its folder."""

import dataclasses
import json
from pathlib import Path

from mft_megatron.exit_codes import OWNED
from mft_megatron.run_folder.names import LOCK, OWNER, TRACKER
from mft_megatron.run_folder.owner.owner import Owner
from tests.parallel.run import arguments_for
from tests.ranks import run_on_ranks


def _train(prefix, folder, loses):
    """Train three steps, with a save after each; another run takes the folder over after the first save."""
    import torch

    from mft_megatron.errors import InputError
    from mft_megatron.run_folder.owner.owner import PACE
    from mft_megatron.training.pretrain import pretrain
    from mft_megatron.training.saving.saver import Saver

    poll = Saver.poll

    def lose(self, progress, log):
        poll(self, progress, log)
        if loses and progress.step == 2 and torch.distributed.get_rank() == 0:
            record = json.loads(Path(folder, OWNER).read_text())
            Path(folder, OWNER).write_text(json.dumps({**record, "host": "other", "token": "another"}))

    Saver.poll = lose
    owner = Owner(folder, pace=dataclasses.replace(PACE, patience=0.2))
    arguments = arguments_for(prefix, f"--train-iters 3 --save-interval 1 --save {folder}", 2)
    try:
        with owner:
            pretrain(arguments, owner=owner)
    except InputError as error:
        return error.code, str(error)
    return 0, ""


def test_a_second_run_ends_on_all_ranks_and_changes_nothing(dataset_prefix, tmp_path):
    with Owner(tmp_path) as owner:
        owner.acquire()
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        for code, said in run_on_ranks(2, _train, dataset_prefix, str(tmp_path), False):
            assert code == OWNED
            assert "which is running; wait for it, end it, or choose another --save" in said
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_has_lost_its_folder_saves_nothing_more(dataset_prefix, tmp_path):
    for code, said in run_on_ranks(2, _train, dataset_prefix, str(tmp_path), True):
        assert code == OWNED
        assert "no longer owns its run folder" in said
    assert (tmp_path / TRACKER).read_text() == "1\n"
    folders = {path.name for path in tmp_path.iterdir() if path.name.startswith(("iter", ".saving"))}
    assert folders == {"iter_0000001"}
    assert json.loads((tmp_path / OWNER).read_text())["token"] == "another"


def test_a_run_gives_its_folder_back(dataset_prefix, tmp_path):
    assert [code for code, _ in run_on_ranks(2, _train, dataset_prefix, str(tmp_path), False)] == [0, 0]
    assert (tmp_path / TRACKER).read_text() == "3\n"
    assert not (tmp_path / OWNER).exists()
    assert not (tmp_path / LOCK).exists()

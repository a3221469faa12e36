"""State that is not sharded is in common.pt under every release, and loads from where the release keeps it, too."""

import shutil

import pytest
import torch

from mft_megatron.common_state import ENTRY
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing import common_state
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from mft_megatron.run_folder.found import latest_checkpoint
from tests.parallel.run import some_steps
from tests.ranks import run_on_ranks

ASYNC = "--async-save --save none"


@pytest.fixture(scope="module", params=["", ASYNC])
def saved(request, dataset_prefix, tmp_path_factory):
    """Train three steps on two ranks, and save after the second: the folder and the last step's record."""
    folder = str(tmp_path_factory.mktemp("saved"))
    return folder, run_on_ranks(2, some_steps, dataset_prefix, request.param, 2, folder, 2, 3, 1)[0][2:]


def test_common_pt_is_always_written(saved):
    common = torch.load(latest_checkpoint(saved[0]).path / "common.pt", weights_only=True)
    assert common["optimizer"]["steps"] == 2
    assert common["scheduler"]["num_steps"] == 2
    assert common.keys() == {"scheduler", "statistics", "training", "optimizer", "description"}


def test_without_common_pt(dataset_prefix, saved, tmp_path):
    """A release that keeps a second copy resumes from that, bit for bit; for others the checkpoint is damaged."""
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    path = latest_checkpoint(folder).path
    (path / "common.pt").unlink()
    if TensorReader(path).has_entry(ENTRY):
        assert run_on_ranks(2, some_steps, dataset_prefix, "", 2, str(folder), None, 3, 77)[0] == saved[1]
    else:
        with pytest.raises(pytest.fail.Exception, match=r"InputError: .*common.pt is missing; the checkpoint is dam"):
            run_on_ranks(2, some_steps, dataset_prefix, "", 2, str(folder), None, 3, 77)


def _save_to_a_full_disk(prefix, options, folder):
    """Save a checkpoint where ``common.pt`` finds no space, as the main rank alone sees; return each rank's error."""
    import errno

    def write(file, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(common_state, "write_hashed", write)
        with pytest.raises(InputError) as error:
            some_steps(prefix, options, 2, folder, 2, 3, 1)
    return str(error.value)


@pytest.mark.parametrize("options", ["", ASYNC])
def test_a_full_disk_ends_all_ranks_with_a_line(dataset_prefix, tmp_path, options):
    said = run_on_ranks(2, _save_to_a_full_disk, dataset_prefix, options, str(tmp_path))
    how = " in the background" if options else ""
    rest = f"; no checkpoint was completed in {tmp_path}, so nothing can be resumed from there yet"
    assert said[0].startswith(f"{tmp_path}/iter_0000002: cannot be written{how} (the disk is full (")
    assert said[0].endswith(f" MB free now)){rest}")
    assert said[1] == said[0]
    with pytest.raises(InputError, match="no checkpoint was completed there"):
        latest_checkpoint(tmp_path)


def _save_beyond_a_limit(prefix, options, folder):
    """Train, and save where files can only be small; return each rank's error."""
    from tests.full_disk import largest_file

    with largest_file(20_000), pytest.raises(InputError) as error:
        some_steps(prefix, options, 2, folder, 3, 3, 1)
    return str(error.value)


@pytest.mark.parametrize("options", ["", ASYNC])
def test_weights_that_find_no_space_leave_the_previous_checkpoint_the_newest(dataset_prefix, saved, tmp_path, options):
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    said = run_on_ranks(2, _save_beyond_a_limit, dataset_prefix, options, str(folder))
    how = " in the background" if options else ""
    for line in said:
        assert line.startswith(f"{folder}/iter_0000003: cannot be written{how} (File too large for the file system or")
        assert line.endswith("; the previous checkpoint is still the newest of the run")
    assert latest_checkpoint(folder).info.iteration == 2
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(("reads_object", "said"), [(True, None), (False, "reads nothing else; restore the file")])
def test_the_object_alone_needs_a_release_that_reads_it(tmp_path, monkeypatch, reads_object, said):
    class Reader:
        def has_entry(self, name):
            return name == "common_state/shard_0_1"

    monkeypatch.setattr(common_state, "_READS_OBJECT", reads_object)
    if said is None:
        common_state.require_common(tmp_path, Reader())
    else:
        with pytest.raises(InputError, match=said):
            common_state.require_common(tmp_path, Reader())

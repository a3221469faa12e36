"""The common state of Megatron's checkpoints, in both of its forms, is read without executing code."""

import argparse
import io
import pickle
import zipfile

import pytest
import torch

from mft_megatron.common_state import read_args, read_common, refuse_compressed
from mft_megatron.convert.megatron.description import read_description
from mft_megatron.errors import InputError
from mft_megatron.run_folder.description import is_of_megatron
from tests.convert.megatron_models import SHAPE, args_of, move_to_object
from tests.ranks import run_on_ranks
from tests.trap import Trap

FORMS = ("common.pt", "object")


def store(folder, form, content):
    """Store a common state in one of its forms."""
    torch.save(content, folder / "common.pt")
    if form == "object":
        move_to_object(folder)


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_read(tmp_path, form):
    assert (read_common(tmp_path), is_of_megatron(tmp_path)) == ({}, False)
    store(tmp_path, form, {"args": argparse.Namespace(**args_of("llama")), "iteration": 3})
    args = read_args(read_common(tmp_path))
    assert (args["hidden_size"], args["save"].name.split(".")[-1]) == (32, "PosixPath")
    assert read_common(tmp_path)["iteration"] == 3
    assert (read_description(tmp_path)[0].num_query_groups, is_of_megatron(tmp_path)) == (2, True)


@pytest.mark.parametrize("form", FORMS)
def test_no_code_in_it_is_executed(tmp_path, form):
    sprung = tmp_path / "sprung"
    state = {"args": Trap(sprung), "iteration": 3}
    torch.load(_saved(state), weights_only=False)
    assert sprung.exists()  # an ordinary reader executes it
    sprung.unlink()
    if form == "object":
        move_to_object(tmp_path, state)
    else:
        torch.save(state, tmp_path / "common.pt")
    common = read_common(tmp_path)
    assert (common["iteration"], read_args(common)) == (3, None)
    with pytest.raises(InputError, match="neither args in its common state"):
        read_description(tmp_path)
    assert not is_of_megatron(tmp_path)
    assert not sprung.exists()


def _saved(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    stream.seek(0)
    return stream


def test_no_code_in_the_index_is_executed(tmp_path):
    sprung = tmp_path / "sprung"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(InputError, match=r"\.metadata: cannot be read .* the checkpoint is damaged"):
        read_common(tmp_path)
    assert not sprung.exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_state_without_args(tmp_path, form):
    store(tmp_path, form, {"iteration": 3})
    with pytest.raises(InputError, match=r"neither args in its common state \(common.pt, or common_state in its"):
        read_description(tmp_path)
    assert not is_of_megatron(tmp_path)
    store(tmp_path, form, ["no", "dict"])
    with pytest.raises(InputError, match="its common state holds no dict"):
        read_common(tmp_path)


def test_damage_of_common_pt(tmp_path):
    (tmp_path / "common.pt").write_bytes(b"PK and then nothing")
    with pytest.raises(InputError, match=r"common.pt: cannot be read .* the checkpoint is damaged"):
        read_common(tmp_path)
    with zipfile.ZipFile(tmp_path / "common.pt", "w") as archive:
        archive.writestr("other", "content")
    with pytest.raises(InputError, match=r"common.pt: cannot be read .* the checkpoint is damaged"):
        read_common(tmp_path)


def _change_index(path, **changes):
    index = pickle.loads((path / ".metadata").read_bytes())
    (stored,) = index.storage_data.values()
    for name, value in changes.items():
        object.__setattr__(stored, name, value)
    (path / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / ".metadata").write_bytes(b"\x80\x04"), r"\.metadata: cannot be read"),
        (lambda path: (path / ".metadata").write_bytes(pickle.dumps({})), r"\.metadata: cannot be read"),
        (lambda path: (path / "__common.distcp").unlink(), "__common.distcp: common_state: cannot be read"),
        (lambda path: (path / "__common.distcp").write_bytes(b"short"), "common_state: cannot be read"),
        (lambda path: _change_index(path, length=200), "common_state: cannot be read"),
        (lambda path: _change_index(path, length=10**18), "common_state: cannot be read .the file is too short"),
        (lambda path: _change_index(path, offset=0), "common_state: cannot be read"),
        (lambda path: _change_index(path, offset=-1), "common_state: cannot be read"),
        (lambda path: _change_index(path, relative_path=None), "does not say where common_state is stored"),
        (lambda path: _change_index(path, relative_path="../x/__common.distcp"), "does not say where common_state"),
        (lambda path: _change_index(path, transform_descriptors=["zstd"]), "common_state is stored compressed"),
    ],
)
def test_damage_of_the_object(tmp_path, damage, reason):
    path = tmp_path / "x"
    move_to_object(path, {"args": argparse.Namespace(**SHAPE)})
    assert read_args(read_common(path))
    damage(path)
    with pytest.raises(InputError, match=reason):
        read_common(path)
    assert not is_of_megatron(path)


def _save_with_megatron(folder):
    """Save a small state with the installed Megatron-Core.

    Returns:
        entries of the checkpoint's index, and whether the common state is an object.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import FileSystemReader

    from mft_megatron.mcore.platform import patched  # noqa: F401

    filesystem_async._results_queue = None  # saves of this project need none
    torch.distributed.init_process_group("gloo")
    weight = ShardedTensor.from_rank_offsets("weight", torch.ones(2))
    dist_checkpointing.save(_state() | {"model": {"weight": weight}}, str(folder))
    return sorted(FileSystemReader(folder).read_metadata().state_dict_metadata), not (folder / "common.pt").is_file()


def _state():
    return {"args": argparse.Namespace(**args_of("llama")), "iteration": 7, "checkpoint_version": 3.0}


@pytest.mark.filterwarnings("ignore")  # of Megatron-Core
def test_megatron_core_writes_that_layout(tmp_path):
    real, made = tmp_path / "real", tmp_path / "made"
    real.mkdir()
    entries, is_object = run_on_ranks(1, _save_with_megatron, real)[0]
    if not is_object:  # up to Megatron-Core 0.18
        assert torch.load(real / "common.pt", weights_only=False) == _state()
        move_to_object(real)
    move_to_object(made, _state())
    assert entries == (["common_state/shard_0_1"] if is_object else []) + ["weight"]
    of_real, of_made = read_common(real), read_common(made)
    assert (of_real["iteration"], len(of_real["args"].state)) == (7, len(SHAPE) + 1)
    assert repr(of_real["args"].state) == repr(of_made["args"].state)


def test_a_compressed_file_is_refused(tmp_path):
    """A few kilobytes of it can become gigabytes in memory."""
    with zipfile.ZipFile(tmp_path / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("common/data.pkl", pickle.dumps({"text": "x" * 1_000_000}))
    for read in (read_common, refuse_compressed):
        with pytest.raises(InputError, match=r"common\.pt: cannot be read \(common/data\.pkl in it is compressed\)"):
            read(tmp_path)

"""Weights of a checkpoint are read without executing code that its index names."""

import pickle

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, MetadataIndex

from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from tests.trap import Trap


@pytest.fixture
def checkpoint(tmp_path):
    weights = {"stacked": torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4), "flat": torch.arange(5.0)}
    save(weights, storage_writer=FileSystemWriter(tmp_path / "ckpt"))
    return tmp_path / "ckpt", weights


@pytest.mark.filterwarnings("ignore")  # of torch, which saves without process groups
def test_weights_are_read_and_unknown_names_of_the_index_are_inert(checkpoint):
    path, weights = checkpoint
    sprung = path / "sprung"
    index = pickle.loads((path / ".metadata").read_bytes())
    index.planner_data = {"trap": Trap(sprung)}
    (path / ".metadata").write_bytes(pickle.dumps(index))
    pickle.loads((path / ".metadata").read_bytes())
    assert sprung.exists()  # torch executes it
    sprung.unlink()
    reader = TensorReader(path)
    assert sorted(reader.names()) == sorted(weights)
    assert reader.entry("stacked") == ((2, 3, 4), torch.bfloat16)
    assert torch.equal(reader.read("stacked", (1,)), weights["stacked"][1])
    assert torch.equal(reader.read("flat"), weights["flat"])
    assert not sprung.exists()


@pytest.mark.filterwarnings("ignore")  # of torch, which saves without process groups
def test_memory_formats_by_name_are_read(checkpoint, monkeypatch):
    """Python 3.11.0 to 3.11.3 pickle a member of an enum as ``getattr(class, name)``, all others by its value."""
    path, weights = checkpoint
    index = pickle.loads((path / ".metadata").read_bytes())
    by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    (path / ".metadata").write_bytes(pickle.dumps(index))
    assert b"getattr" in (path / ".metadata").read_bytes()
    assert torch.equal(TensorReader(path).read("flat"), weights["flat"])


@pytest.mark.parametrize("content", [None, {}, MetadataIndex("flat")])
def test_an_index_that_is_none(tmp_path, content):
    sprung = tmp_path / "sprung"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap(sprung) if content is None else content))
    with pytest.raises(InputError, match=r"its index .metadata cannot be read \(it holds no index of torch\)"):
        TensorReader(tmp_path)
    assert not sprung.exists()

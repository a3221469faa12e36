"""Weights of a checkpoint are read without executing code that its index names."""

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.metadata import MetadataIndex

from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader


class _Trap:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return Path.touch, (self._file,)


@pytest.fixture
def checkpoint(tmp_path):
    weights = {"stacked": torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4), "flat": torch.arange(5.0)}
    save(weights, storage_writer=FileSystemWriter(tmp_path / "ckpt"))
    return tmp_path / "ckpt", weights


@pytest.mark.filterwarnings("ignore")  # of torch, which saves without process groups
def test_weights_are_read_and_unknown_names_of_the_index_are_inert(checkpoint):
    path, weights = checkpoint
    sprung = path / "sprung"
    index = FileSystemReader(path).read_metadata()
    index.planner_data = {"trap": _Trap(sprung)}
    (path / ".metadata").write_bytes(pickle.dumps(index))
    FileSystemReader(path).read_metadata()
    assert sprung.exists()  # torch executes it
    sprung.unlink()
    reader = TensorReader(path)
    assert sorted(reader.names()) == sorted(weights)
    assert reader.entry("stacked") == ((2, 3, 4), torch.bfloat16)
    assert torch.equal(reader.read("stacked", (1,)), weights["stacked"][1])
    assert torch.equal(reader.read("flat"), weights["flat"])
    assert not sprung.exists()


@pytest.mark.parametrize("content", [None, {}, MetadataIndex("flat")])
def test_an_index_that_is_none(tmp_path, content):
    sprung = tmp_path / "sprung"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Trap(sprung) if content is None else content))
    with pytest.raises(InputError, match=r"its index .metadata cannot be read \(it holds no index of torch\)"):
        TensorReader(tmp_path)
    assert not sprung.exists()

"""Nothing that a checkpoint names is executed when Megatron-Core, torch or Transformer Engine load it."""

import collections
import importlib.util
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, default_planner, filesystem, load, save
from torch.distributed.checkpoint.api import CheckpointException

from mft_megatron.mcore.platform.checkpoint_pickles import load_without_code, refuse_code
from tests.trap import Trap

load_without_code()
# torch says that there are no process groups
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint whose index and whose object are traps; returns its folder and the files that these would create."""
    path, of_index, of_object = (tmp_path / name for name in ("ckpt", "index", "object"))
    save({"weight": torch.arange(3.0), "object": Trap(of_object)}, storage_writer=FileSystemWriter(path))
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = Trap(of_index)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path, of_index, of_object


def _read(state, reader, planner):
    """Fill a state dict as torch and Megatron-Core do."""
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    reader.read_data(planner.create_local_plan(), planner).wait()


def _unchanged(module):
    """Execute a module once more, as it is without replacements."""
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.unchanged", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def test_torch_executes_what_a_checkpoint_names(checkpoint):
    path, of_index, of_object = checkpoint
    planner = _unchanged(default_planner).DefaultLoadPlanner(flatten_state_dict=False)
    _read({"object": None}, _unchanged(filesystem).FileSystemReader(path), planner)
    assert of_index.exists()
    assert of_object.exists()


def test_an_index_is_loaded_without_what_it_names(checkpoint):
    from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader

    path, of_index, of_object = checkpoint
    assert set(_get_filesystem_reader(path).read_metadata().state_dict_metadata) == {"weight", "object"}
    state = {"weight": torch.zeros(3)}
    load(state, checkpoint_id=path, no_dist=True)
    assert state["weight"].equal(torch.arange(3.0))
    assert not of_index.exists()
    assert not of_object.exists()


def test_an_object_with_code_is_refused(checkpoint):
    path, _, of_object = checkpoint
    with pytest.raises(CheckpointException, match="object holds more than tensors, numbers, texts, lists and dicts"):
        load({"object": None}, checkpoint_id=path, no_dist=True)
    assert not of_object.exists()


def test_objects_of_checkpoints_are_loaded(tmp_path):
    states = {"cpu": torch.get_rng_state(), "device": None, "tracker": {"seed": torch.arange(3, dtype=torch.uint8)}}
    planner = default_planner.DefaultSavePlanner(flatten_state_dict=False)
    stored = {"rng": states, "common": [{"steps": 3, "name": "Ä"}]}
    save(stored, storage_writer=FileSystemWriter(tmp_path), planner=planner)
    planner = default_planner.DefaultLoadPlanner(flatten_state_dict=False)
    _read({"rng": None, "common": None}, FileSystemReader(tmp_path), planner)
    loaded = planner.state_dict
    assert loaded["common"] == [{"steps": 3, "name": "Ä"}]
    assert loaded["rng"]["cpu"].equal(states["cpu"])
    assert loaded["rng"]["device"] is None


def _pickled(content):
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


def test_states_of_transformer_engine_are_accepted():
    # the content of its extra states in 2.9
    state = {"scale_fwd": torch.ones(2), "amax_history_fwd": torch.zeros(4, 2), "extra_fp8_variables": {"n": 1}}
    states = {"a._extra_state": _pickled(collections.OrderedDict(state)), "b._extra_state": torch.empty(0).byte()}
    refuse_code({**states, "c._extra_state": None, "d._extra_state": io.BytesIO(b"")})
    assert pickle.loads(states["a._extra_state"].numpy().tobytes())["scale_fwd"].equal(torch.ones(2))


def test_extra_states_with_code_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\._extra_state is no state of a layer: it names pathlib"):
        refuse_code({"a._extra_state": _pickled({"recipe": Trap(tmp_path / "file")})})
    with pytest.raises(ValueError, match="is no state of a layer"):
        refuse_code({"a._extra_state": torch.arange(9).byte()})


def test_tensors_within_extra_states_execute_nothing(tmp_path):
    content = io.BytesIO()
    torch.save(Trap(tmp_path / "file"), content)

    class Tensors:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (content.getvalue(),)

    state = _pickled(Tensors())
    refuse_code({"a._extra_state": state})
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(state.numpy().tobytes())
    assert not (tmp_path / "file").exists()


def test_the_environment_cannot_allow_code(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    load_without_code()
    content = io.BytesIO()
    torch.save(Trap("file"), content)
    content.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(content)

"""Slices of weights out of a checkpoint."""

import pytest
import torch

from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing import tensor_writer
from mft_megatron.mcore.checkpointing.tensor_writer import Weight, write_weights
from mft_megatron.mcore.checkpointing.weight_source import CheckpointSource, WeightSlice
from mft_megatron.run_folder.description import CheckpointInfo

LAYERS = "decoder.layers.mlp.linear_fc1.weight"
EMBEDDING = "embedding.word_embeddings.weight"
NORM = "decoder.final_layernorm.weight"


class InMemory:
    """A source of weights that are in memory, whole and stacked, by name."""

    def __init__(self, weights):
        self.weights = weights

    def read(self, wanted):
        return self.weights[wanted.name][wanted.index][wanted.region]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint of three weights, in several slices, with 5 real rows of an embedding of 8; and the weights."""
    path = tmp_path_factory.mktemp("checkpoint") / "iter_0000001"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {LAYERS: (3, 12, 6), EMBEDDING: (8, 6), NORM: (6,)}
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    slices = [WeightSlice(LAYERS, (layer,), (row, 0), (6, 6)) for layer in range(3) for row in (0, 6)]
    slices += [WeightSlice(EMBEDDING, (), (row, 0), (4, 6)) for row in (0, 4)] + [WeightSlice(NORM, (), (0,), (6,))]
    planned = {name: Weight(name, shape, torch.bfloat16) for name, shape in shapes.items()}
    write_weights(path, planned, slices, InMemory(weights), 200)
    return path, weights


@pytest.fixture
def source(stored):
    info = CheckpointInfo(1, 0, {}, 5, {}, "", 1, 8)
    return CheckpointSource(stored[0], info)


def test_slices(stored, source):
    weights = stored[1]
    part = source.read(WeightSlice(LAYERS, (1,), (4, 3), (5, 3)))
    assert part.equal(weights[LAYERS][1, 4:9, 3:6])
    assert source.read(WeightSlice(LAYERS, (2,), (0, 0), (12, 6))).equal(weights[LAYERS][2])
    assert source.read(WeightSlice(NORM, (), (2,), (4,))).equal(weights[NORM][2:])


def test_rows_beyond_the_vocabulary_are_zero(stored, source):
    """Whatever the checkpoint has there: more of them, none, or only such."""
    embedding = stored[1][EMBEDDING]
    part = source.read(WeightSlice(EMBEDDING, (), (4, 0), (4, 6)))
    assert part[:1].equal(embedding[4:5])
    assert part[1:].eq(0).all()
    assert source.read(WeightSlice(EMBEDDING, (), (8, 0), (8, 6))).eq(0).all()
    assert source.read(WeightSlice(EMBEDDING, (), (0, 0), (5, 6))).equal(embedding[:5])


def test_only_needed_chunks_are_read_and_once_for_all_slices_of_a_weight(source, stored, monkeypatch):
    asked = []
    read = source._reader.read_region
    monkeypatch.setattr(source._reader, "read_region", lambda *wanted: asked.append(wanted) or read(*wanted))
    for first, rows in ((0, 6), (5, 3), (7, 5)):
        part = source.read(WeightSlice(LAYERS, (1,), (first, 2), (rows, 4)))
        assert part.equal(stored[1][LAYERS][1, first : first + rows, 2:])
    source.read(WeightSlice(NORM, (), (0,), (6,)))
    source.read(WeightSlice(LAYERS, (1,), (7, 0), (1, 6)))
    first, second = (LAYERS, (1, 0, 0), (1, 6, 6)), (LAYERS, (1, 6, 0), (1, 6, 6))
    assert asked == [first, second, (NORM, (0,), (6,)), second]


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        (("decoder.layers.mlp.linear_fc2.weight", (0,), (0, 0), (1, 1)), "has no decoder.layers.mlp.linear_fc2.weight"),
        ((LAYERS, (3,), (0, 0), (12, 6)), "has 3 layers of decoder.layers.mlp.linear_fc1.weight, and layer 3 is"),
        ((LAYERS, (0,), (8, 0), (8, 6)), r"shape \[12, 6\], at least \[16, 6\] is needed"),
        ((LAYERS, (0,), (0, 0), (12, 7)), r"shape \[12, 6\], at least \[12, 7\] is needed"),
        ((EMBEDDING, (), (0, 0), (8, 7)), r"shape \[8, 6\], at least \[5, 7\] is needed"),
        ((NORM, (), (0, 0), (6, 1)), r"shape \[6\], at least \[6, 1\] is needed"),
    ],
)
def test_another_model_is_refused(source, wanted, complaint):
    with pytest.raises(InputError, match=complaint):
        source.read(WeightSlice(*wanted))


def test_a_vocabulary_that_is_not_whole_is_refused(stored):
    source = CheckpointSource(stored[0], CheckpointInfo(1, 0, {}, 9, {}, "", 1, 8))
    with pytest.raises(InputError, match=r"shape \[8, 6\], at least \[9, 6\] is needed"):
        source.read(WeightSlice(EMBEDDING, (), (0, 0), (4, 6)))


def test_weights_that_are_not_finite_are_named(tmp_path, monkeypatch):
    """When they are written, and when a checkpoint is read that another program wrote."""
    weight = torch.ones(2, 4, 6)
    weight[1, 3, 5] = float("nan")
    slices = [WeightSlice(LAYERS, (layer,), (0, 0), (4, 6)) for layer in range(2)]
    planned, content = {LAYERS: Weight(LAYERS, (2, 4, 6), weight.dtype)}, InMemory({LAYERS: weight})
    with pytest.raises(InputError, match=r"linear_fc1.weight \[1\] would have NaN in it, .* nothing is written"):
        write_weights(tmp_path, planned, slices, content, 200)
    monkeypatch.setattr(tensor_writer, "refuse_to_write", lambda *arguments: None)
    (tmp_path / "foreign").mkdir()
    write_weights(tmp_path / "foreign", planned, slices, content, 200)
    source = CheckpointSource(tmp_path / "foreign", CheckpointInfo(1, 0, {}, 5, {}, "", 1, 8))
    source.read(WeightSlice(LAYERS, (0,), (0, 0), (4, 6)))
    with pytest.raises(InputError, match=r"linear_fc1.weight \[1\] has NaN in it, and every loss would be NaN; take"):
        source.read(WeightSlice(LAYERS, (1,), (0, 0), (1, 1)))

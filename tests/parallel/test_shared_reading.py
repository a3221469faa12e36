"""Weights that several ranks need are read by one of them, sent in pieces, and refused by all where it cannot read."""

import pytest

from mft_megatron.errors import InputError
from tests.ranks import run_on_ranks

SHAPES = {"small": (3,), "embedding": (11, 6), "gate": (5, 6), "up": (7, 6), "router": (2, 6), "norm": (6,)}
# gate and up projection are slices of one weight
WEIGHTS = (("small",), ("embedding",), ("gate", "up"), ("router",), ("norm",))


def _content(name):
    import torch

    content = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name) + ord(name[0])))
    return content.to({"router": torch.float32, "norm": torch.float16}.get(name, torch.bfloat16))


def _read(failing, error, piece_bytes):
    """Read all weights; the rank that is to read ``failing`` gets ``error`` instead.

    Returns:
        names that this rank read, whole contents, bytes of the largest piece, and this rank's refusal.
    """
    import torch
    import torch.distributed as dist

    from mft_megatron.mcore.checkpointing import shared_reading
    from mft_megatron.mcore.checkpointing.weight_source import WeightSlice

    dist.init_process_group("gloo")
    read, pieces = [], {}

    class Source:
        def read(self, wanted):
            read.append(wanted.name)
            if wanted.name == failing:
                raise error
            return _content(wanted.name)

    shared_reading.PIECE_BYTES = piece_bytes
    slices = [[WeightSlice(name, (), (0,) * len(SHAPES[name]), SHAPES[name]) for name in names] for names in WEIGHTS]
    reader = shared_reading.SharedReader(Source(), dist.group.WORLD)
    reader.read(slices, lambda piece: pieces.setdefault((piece.weight, piece.part), []).append(piece))
    whole = {}
    for (weight, part), of_slice in pieces.items():
        assert [piece.first for piece in of_slice] == [
            sum(len(before.content) for before in of_slice[:number]) for number in range(len(of_slice))
        ]
        whole[WEIGHTS[weight][part]] = torch.cat([piece.content for piece in of_slice])
    largest = max(piece.content.nbytes for of_slice in pieces.values() for piece in of_slice)
    dist.destroy_process_group()
    return read, whole, largest, reader.refusal


@pytest.mark.parametrize(("world", "piece_bytes"), [(3, 30), (2, 2**20)])
def test_each_weight_is_read_once_and_sent_in_pieces(world, piece_bytes):
    results = run_on_ranks(world, _read, None, None, piece_bytes)
    assert sorted(name for read, *_ in results for name in read) == sorted(SHAPES)
    assert all("gate" not in read or "up" in read for read, *_ in results)
    for _, whole, largest, refusal in results:
        assert whole.keys() == SHAPES.keys()
        assert all(whole[name].dtype == _content(name).dtype and whole[name].equal(_content(name)) for name in SHAPES)
        assert largest <= piece_bytes
        assert refusal is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("the file is cut off"), "the file is cut off"),
        (OSError(5, "Input/output error", "a.safetensors"), "rank 0 cannot read gate (OSError: [Errno 5] "),
    ],
)
def test_a_rank_that_cannot_read_stops_the_others_without_letting_them_wait(error, line):
    results = run_on_ranks(2, _read, "gate", error, 30)
    # the largest weight is gate and up; rank 1 was reading in the same round, and neither reads after it
    assert [read for read, *_ in results] == [["gate"], ["embedding"]]
    said = [refusal for *_, refusal in results]
    assert said[0].startswith(line)
    assert said[1] is None
    for _, whole, *_ in results:
        assert {name: tuple(content.shape) for name, content in whole.items()} == SHAPES
        assert whole["embedding"].equal(_content("embedding"))
        assert whole["gate"].eq(0).all()

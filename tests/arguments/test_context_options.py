"""Options of context parallelism and of attention windows: derived values and refusals."""

import pytest

from mft_megatron.arguments.values.layer_pattern import layer_pattern, numbers_of
from mft_megatron.errors import InputError
from tests.arguments.command_line import parse
from tests.refusals import refused


def parse_one(extra, world_size=1):
    """Parse a command line with micro-batches of one pack."""
    return parse(f"--micro-batch-size 1 {extra}", world_size)


@pytest.mark.parametrize(
    ("extra", "world_size", "data_parallel_size", "stream_multiple"),
    [
        ("", 1, 1, 1),
        ("--context-parallel-size 2", 2, 1, 4),
        ("--context-parallel-size 2", 8, 4, 4),
        ("--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel", 8, 2, 4),
        ("--context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel", 8, 1, 8),
        ("--context-parallel-size 2 --tensor-model-parallel-size 4", 8, 1, 4),
        ("--tensor-model-parallel-size 4 --sequence-parallel", 4, 1, 4),
        ("--context-parallel-size 3 --seq-length 96 --pipeline-model-parallel-size 2", 6, 1, 6),
        ("--context-parallel-size 4 --micro-batch-size 8 --seq-length 125 --cp-comm-type all_gather", 4, 1, 8),
    ],
)
def test_context_parallel_ranks_count_once_in_data_parallelism(extra, world_size, data_parallel_size, stream_multiple):
    arguments = parse_one(extra, world_size)
    assert arguments.data_parallel_size == data_parallel_size
    assert arguments.distributed.stream_multiple == stream_multiple
    micro_batch_size = arguments.training.micro_batch_size
    assert arguments.training.global_batch_size == micro_batch_size * data_parallel_size


@pytest.mark.parametrize(
    ("extra", "world_size", "words"),
    [
        ("--context-parallel-size 2", 3, "3 ranks cannot be divided into --tensor-model-parallel-size 1"),
        ("--context-parallel-size 2", 3, "× --context-parallel-size 2 = 2; start a multiple of 2"),
        ("--context-parallel-size 0", 1, "--context-parallel-size 0: must be at least 1"),
        (
            "--context-parallel-size 3",
            3,
            "--context-parallel-size 3: --micro-batch-size 1 × --seq-length 128 = 128 tokens cannot be cut into 2 × 3 "
            "equal blocks; pack the data for a --seq-length that is a multiple of 6",
        ),
        (
            "--context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel --seq-length 124",
            8,
            "equal blocks, and those of a rank over --tensor-model-parallel-size 4; pack the data for a --seq-length "
            "that is a multiple of 8",
        ),
        ("--context-parallel-size 3 --micro-batch-size 2 --seq-length 128", 3, "that is a multiple of 3"),
        (
            "--tensor-model-parallel-size 4 --sequence-parallel --seq-length 126",
            4,
            "--sequence-parallel: --tensor-model-parallel-size 4 does not divide --micro-batch-size 1 × --seq-length "
            "126 = 126 tokens",
        ),
        ("--context-parallel-size 2 --cp-comm-type p2p", 2, "--cp-comm-type p2p: only all_gather"),
        ("--cp-comm-type all_gather a2a", 1, "--cp-comm-type all_gather a2a: only all_gather"),
    ],
)
def test_tokens_that_ranks_cannot_split(extra, world_size, words):
    with refused(words):
        parse_one(extra, world_size)


@pytest.mark.parametrize(
    ("extra", "window", "layers"),
    [
        ("", None, None),
        ("--window-size 20,0", 20, None),
        ("--window-size (20,0) --window-attn-skip-freq 2", 20, 2),
        ("--window-size 0,0 --window-attn-skip-freq ([1]*1+[0])*2", 0, [1, 0, 1, 0]),
        ("--window-size=-1,0", None, None),
    ],
)
def test_windows(extra, window, layers):
    network = parse_one(extra).network
    assert network.window == window
    assert numbers_of(network.window_attn_skip_freq) == layers


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("--window-size 20,1", "none to the right"),
        ("--window-size=-2,0", "at least 0, or -1"),
        ("--window-size 20", "--window-size"),
        ("--window-size x,0", "--window-size"),
        ("--window-attn-skip-freq 2", "--window-attn-skip-freq has no effect without --window-size"),
        ("--window-size 3,0 --window-attn-skip-freq [1,0]", "a list of 2 layers and --num-layers is 4"),
        ("--window-size 3,0 --window-attn-skip-freq 0", "--window-attn-skip-freq"),
        ("--window-size 3,0 --window-attn-skip-freq [2]*4", "--window-attn-skip-freq"),
    ],
)
def test_windows_that_are_refused(extra, words):
    with refused(words):
        parse_one(extra)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("[1]*3+[0]", [1, 1, 1, 0]), ("([0]+[1]*2)*2", [0, 1, 1, 0, 1, 1]), ("2*[1,0]", [1, 0, 1, 0])],
)
def test_patterns(text, value):
    assert layer_pattern(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "[", "[x]", "[1.5]", "[True]", "1.5", "[[1]]", "[]", "[1]*0", "f()", "[1]*10**9", "[1]*999999999", "1,0"],
)
def test_malformed_patterns_are_refused(text):
    """Only lists, sums and products are evaluated, and none that is longer than the layers of any model."""
    with pytest.raises(InputError):
        layer_pattern(text)

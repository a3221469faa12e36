"""Options of exports and of Gemma's layers: accepted and refused ones."""

import pytest

from tests.arguments.command_line import parse
from tests.refusals import refused

SAVE = "--save x --save-hf y"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            "--save x --save-interval 2 --save-hf-interval 2",
            "--save-hf-interval 2 without --save-hf: give --save-hf DIR",
        ),
        (f"{SAVE} --save-hf-interval 2", "--save-hf-interval 2 without --save-interval: give --save-interval, too"),
        (
            f"{SAVE} --save-interval 4 --save-hf-interval 6",
            "6 is not a multiple of --save-interval 4, and only checkpoints are",
        ),
        (f"{SAVE} --save-interval 4 --save-hf-interval 0", "--save-hf-interval 0: must be at least 1"),
        (f"{SAVE} --skip-train", "--save-hf has no effect without training, which --skip-train leaves out"),
        ("--swiglu --gated-linear-unit", "--swiglu is a gated linear unit, with SiLU; leave --gated-linear-unit out"),
    ],
)
def test_refused(extra, words):
    with refused(words):
        parse(extra)


def test_accepted():
    assert parse(f"{SAVE} --save-interval 2 --save-hf-interval 4").checkpoint.save_hf_interval == 4
    network = parse("--gated-linear-unit --openai-gelu --scale-embeddings-by-hidden-size").network
    assert (network.gated, network.swiglu, parse("--swiglu").network.gated, parse().network.gated) == (1, 0, 1, 0)

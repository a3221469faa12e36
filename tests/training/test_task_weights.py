"""--task-weights: what is read and what is refused."""

import pytest

from mft_megatron.errors import InputError
from mft_megatron.training.task_weights import task_weights

TASKS = ("write", "explain", "a=b")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, [1, 1, 1]),
        (("explain=2.5",), [1, 2.5, 1]),
        (("a=b=3", "write=0"), [0, 1, 3]),
        (("[1, 2, 3.5]",), [1, 2, 3.5]),
    ],
)
def test_weights_by_name_or_in_order(options, expected):
    assert task_weights(options, TASKS).tolist() == expected


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("unknown=1",), "with a task of: write, explain, a=b"),
        (("write",), "give NAME=NUMBER"),
        (("write=1", "write=2"), "write is given twice"),
        (("write=much",), "'much' is not a number"),
        (("write=-1",), "not negative"),
        (("write=nan",), "finite"),
        (("[1, 2]",), "2 numbers for 3 tasks"),
        (("[0, 0, 0]",), "at least one task needs a weight"),
    ],
)
def test_refused(options, text):
    with pytest.raises(InputError, match=text):
        task_weights(options, TASKS)

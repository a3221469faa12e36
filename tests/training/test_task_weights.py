"""Numbers per task: what is read and what is refused."""

import pytest

from mft_megatron.arguments.groups.multi_task import MultiTaskArguments
from mft_megatron.errors import InputError
from mft_megatron.training.task_weights import data_weights_text, initial_weights, task_numbers

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
    assert initial_weights(MultiTaskArguments(task_weights=options), TASKS).tolist() == expected


@pytest.mark.parametrize("loss", ["focal-sample", "focal-task"])
def test_of_the_focal_losses_the_weights_are_the_alphas(loss):
    options = MultiTaskArguments(mft_loss=loss, focal_alpha=("explain=2.5",))
    assert initial_weights(options, TASKS).tolist() == [1, 2.5, 1]
    with pytest.raises(InputError, match="--focal-alpha: numbers must be above 0"):
        initial_weights(MultiTaskArguments(mft_loss=loss, focal_alpha=("write=0",)), TASKS)


def test_messages_name_the_option():
    assert task_numbers("--famo-min-losses", ("explain=0.5",), TASKS, default=0.0).tolist() == [0, 0.5, 0]
    with pytest.raises(InputError, match="--famo-min-losses none=1: give NAME=NUMBER"):
        task_numbers("--famo-min-losses", ("none=1",), TASKS, default=0.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("unknown=1",), "with a task of: write, explain, a=b"),
        (("write",), "give NAME=NUMBER"),
        (("write=1", "write=2"), "write is given twice"),
        (("write=much",), "'much' is not a number"),
        (("write=-1",), "not be negative"),
        (("write=nan",), "finite"),
        (("write=1e308", "explain=1e308"), "and their sum must be finite"),
        (("[1, null, 2]",), "null is not a number"),
        (('["a", 1, 2]',), '"a" is not a number'),
        (("[1, 2, true]",), "true is not a number"),
        (("[1, 2]",), "2 numbers for 3 tasks"),
        (("[0, 0, 0]",), "at least one task needs a weight"),
    ],
)
def test_refused(options, text):
    with pytest.raises(InputError, match=text):
        initial_weights(MultiTaskArguments(task_weights=options), TASKS)


def test_of_many_tasks_only_the_nearest_is_named():
    names = [f"task{number}" for number in range(300)]
    with pytest.raises(InputError, match="with one of the data set's 300 tasks; did you mean task7") as refusal:
        task_numbers("--task-weights", ("taks7=1",), names, default=1.0)
    assert len(str(refusal.value)) < 200


OF_DATA = (2.0, None, 0.5)


@pytest.mark.parametrize(
    ("given", "expected", "line"),
    [
        ({}, [2, 1, 0.5], "task weights of the data set: write=2, a=b=0.5"),
        (
            {"task_weights": ("write=3",)},
            [3, 1, 0.5],
            "task weights of the data set: write=2, a=b=0.5; --task-weights changes write",
        ),
        (
            {"task_weights": ("[1, 2, 3]",)},
            [1, 2, 3],
            "task weights of the data set: write=2, a=b=0.5; --task-weights changes write, a=b",
        ),
        (
            {"mft_loss": "token"},
            [1, 1, 1],
            "task weights of the data set are not used, --mft-loss token takes none: write=2, a=b=0.5",
        ),
        (
            {"mft_loss": "focal-task"},
            [1, 1, 1],
            "task weights of the data set are not used, --mft-loss focal-task takes none: write=2, a=b=0.5",
        ),
    ],
)
def test_weights_of_the_data_set_hold_where_none_are_named(given, expected, line):
    options = MultiTaskArguments(**given)
    assert initial_weights(options, TASKS, OF_DATA).tolist() == expected
    assert data_weights_text(options, TASKS, OF_DATA) == line
    assert data_weights_text(options, TASKS, (None,) * 3) is None


def test_a_balancer_sets_the_weights():
    line = data_weights_text(MultiTaskArguments(task_balance="coba"), TASKS, OF_DATA)
    assert line == "task weights of the data set are not used, --task-balance coba sets them: write=2, a=b=0.5"

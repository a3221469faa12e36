"""Early stopping against a reference that goes through the whole history at every evaluation."""

import json
import math
import random

import pytest

from mft_megatron.errors import InputError
from mft_megatron.training.early_stopping import Curve, EarlyStopping, StoppedTask, StoppingState

TASKS = ("write", "explain", "read")


def record(step, losses, objective=0.0):
    """A record of :func:`valid_record` with these losses of the tasks, and their mean."""
    present = [loss for loss in losses if loss is not None]
    return {
        "kind": "valid",
        "step": step,
        "loss": objective,
        "macro_loss": sum(present) / len(present) if present else None,
        "tasks": {name: {"loss": loss} for name, loss in zip(TASKS, losses, strict=True)},
    }


def run(stopping, records, state=None):
    """The last state, and all outcomes."""
    state, outcomes = state or stopping.begin(), []
    for one in records:
        state, outcome = stopping.after_evaluation(state, one)
        outcomes.append(outcome)
    return state, outcomes


def macro(values):
    return [record(10 * (i + 1), [value] * 3) for i, value in enumerate(values)]


def improvements(values, min_delta):
    """Indices of the values that improve on all improvements before them."""
    best, indices = [], []
    for i, value in enumerate(values):
        if value is not None and math.isfinite(value) and all(value < other - min_delta for other in best):
            best.append(value)
            indices.append(i)
    return indices


def stall(values, min_delta):
    """Evaluations since the last improvement."""
    indices = improvements(values, min_delta)
    return sum(value is not None for value in values[indices[-1] + 1 if indices else 0 :])


@pytest.mark.parametrize("metric", ["macro", "objective", "explain"])
@pytest.mark.parametrize("min_delta", [0.0, 0.25])
@pytest.mark.parametrize("seed", range(5))
def test_every_evaluation_against_the_whole_history(metric, min_delta, seed):
    rng = random.Random(seed)
    # eighths: no rounding, so that differences of exactly min_delta occur
    values = [[rng.choice([None, *(n / 8 for n in range(4, 16))]) for _ in TASKS] for _ in range(30)]
    records = [record(i, losses, rng.randrange(4, 16) / 8) for i, losses in enumerate(values)]
    follow = {"macro": lambda r: r["macro_loss"], "objective": lambda r: r["loss"]}.get(
        metric, lambda r: r["tasks"][metric]["loss"]
    )
    followed = [follow(one) for one in records]
    patience, task_patience = 4, 6
    stopping = EarlyStopping(TASKS, patience, metric, min_delta, task_patience)
    state, outcomes = run(stopping, records)
    improved = improvements(followed, min_delta)
    assert [i for i, outcome in enumerate(outcomes) if outcome.improved] == improved
    assert (state.run.best, state.run.step) == (followed[improved[-1]], improved[-1])
    stops = {name: None for name in TASKS}
    for i, outcome in enumerate(outcomes):
        expected = []
        for name in TASKS:
            losses = [one["tasks"][name]["loss"] for one in records[: i + 1]]
            if stops[name] is None and stall(losses, min_delta) >= task_patience:
                stops[name], best = i, improvements(losses, min_delta)[-1]
                expected.append(StoppedTask(name, losses[best], best))
        assert outcome.stopped_tasks == tuple(expected)
        assert outcome.stop == (stall(followed[: i + 1], min_delta) >= patience or None not in stops.values())
    assert state.stopped_at == tuple(stops.values())
    assert any(step is not None for step in state.stopped_at)


def test_a_run_stops_after_its_patience_and_says_why():
    state, outcomes = run(EarlyStopping(TASKS, 2), macro([3.0, 2.0, 2.5, 2.25]))
    assert [outcome.improved for outcome in outcomes] == [True, True, False, False]
    assert [outcome.stop for outcome in outcomes] == [False, False, False, True]
    assert "macro validation loss: best 2 at step 20" in outcomes[-1].reason
    assert "in 2 evaluations since (--early-stopping-patience 2)" in outcomes[-1].reason
    assert state.run == Curve(2.0, 20, 2)


def test_a_gain_of_exactly_min_delta_is_none_and_small_gains_add_up():
    stopping = EarlyStopping(TASKS, 3, min_delta=0.5)
    assert [o.improved for o in run(stopping, macro([2.0, 1.5]))[1]] == [True, False]
    state, outcomes = run(stopping, macro([2.0, 1.75, 1.5, 1.25, 1.0]))
    assert [outcome.improved for outcome in outcomes] == [True, False, False, True, False]
    assert not outcomes[-1].stop
    assert state.run == Curve(1.25, 40, 1)
    assert [o.improved for o in run(EarlyStopping(TASKS, 3), macro([2.0, 2.0, 1.999]))[1]] == [True, False, True]


def test_without_patience_the_best_is_known_and_nothing_stops():
    state, outcomes = run(EarlyStopping(TASKS), macro([1.0] + 50 * [2.0]))
    assert not any(outcome.stop or outcome.stopped_tasks for outcome in outcomes)
    assert state.run == Curve(1.0, 10, 50)
    assert state.active_K.tolist() == [True, True, True]


def test_nan_is_never_the_best_and_counts():
    _, outcomes = run(EarlyStopping(TASKS, 2), macro([math.nan, math.inf]))
    assert [outcome.improved for outcome in outcomes] == [False, False]
    assert "no finite value" in outcomes[-1].reason
    state, _ = run(EarlyStopping(TASKS, 2), macro([math.nan, 2.0, math.nan]))
    assert state.run == Curve(2.0, 20, 1)


def test_an_evaluation_without_the_task_does_not_count():
    losses = [[1.0, 2.0, 1.0], [1.0, None, 1.0], [1.0, None, 1.0], [1.0, 2.0, 1.0]]
    _, outcomes = run(EarlyStopping(TASKS, 1, "explain"), [record(i, row) for i, row in enumerate(losses)])
    assert [outcome.improved for outcome in outcomes] == [True, False, False, False]
    assert [outcome.stop for outcome in outcomes] == [False, False, False, True]


def test_a_converged_task_is_stopped_once_and_stays_stopped():
    losses = [[1.0, 3.0], [1.5, 2.0], [1.25, 1.5], [0.5, 1.0], [0.25, 0.5]]
    stopping = EarlyStopping(TASKS, 2, task_patience=2, validated=TASKS[:2])
    state, outcomes = run(stopping, [record(10 * i, [*row, None]) for i, row in enumerate(losses)])
    assert [outcome.stopped_tasks for outcome in outcomes] == [(), (), (StoppedTask("write", 1.0, 0),), (), ()]
    assert state.active_K.tolist() == [False, True, True]
    assert state.active_K.dtype == bool
    assert state.stopped_at == (20, None, None)
    assert state.tasks[0] == Curve(1.0, 0, 2)
    assert not outcomes[-1].stop


def test_a_task_without_validation_data_goes_on_and_keeps_the_run_going():
    flat = [record(i, [1.0, 1.0, None]) for i in range(9)]
    state, outcomes = run(EarlyStopping(TASKS, task_patience=2, validated=TASKS[:2]), flat)
    assert state.active_K.tolist() == [False, False, True]
    assert not outcomes[-1].stop
    state, outcomes = run(EarlyStopping(TASKS, task_patience=2, trained=TASKS[:2]), flat)
    assert [outcome.stop for outcome in outcomes[:3]] == [False, False, True]
    assert "every task has stopped (--task-early-stopping-patience 2)" in outcomes[2].reason


def test_a_task_that_is_not_trained_is_not_stopped():
    flat = [record(i, [1.0, 1.0, 1.0]) for i in range(4)]
    state, outcomes = run(EarlyStopping(TASKS, task_patience=2, trained=("read",)), flat)
    assert state.active_K.tolist() == [True, True, False]
    assert [task.name for outcome in outcomes for task in outcome.stopped_tasks] == ["read"]
    assert outcomes[-1].stop


def test_the_state_is_resumed_exactly():
    rng = random.Random(3)
    records = [record(i, [rng.random() / 3 for _ in TASKS], rng.random()) for i in range(20)]
    stopping = EarlyStopping(TASKS, 5, min_delta=0.1, task_patience=4)
    whole, outcomes = run(stopping, records)
    for cut in range(len(records) + 1):
        state, before = run(stopping, records[:cut])
        saved = json.loads(json.dumps(state.as_dict(), allow_nan=False))
        assert StoppingState.from_dict(saved) == state
        after = run(stopping, records[cut:], stopping.resume(saved))
        assert (after[0], before + after[1]) == (whole, outcomes)
    assert any(outcome.stopped_tasks for outcome in outcomes)


def test_a_finished_run_stays_finished_until_its_patience_is_raised():
    content = run(EarlyStopping(TASKS, 2), macro([1.0, 2.0, 2.0]))[0].as_dict()

    def finished(**options):
        stopping = EarlyStopping(TASKS, **options)
        return stopping.finished(stopping.resume(content))

    assert "best 1 at step 10" in finished(patience=2)
    assert "in 2 evaluations since (--early-stopping-patience 1)" in finished(patience=1)
    assert finished(patience=3) is None
    assert finished(patience=None) is None
    assert EarlyStopping(TASKS, 2).finished(EarlyStopping(TASKS, 2).begin()) is None


def test_another_metric_starts_again_and_does_not_change_the_tasks():
    stopping = EarlyStopping(TASKS, 2, task_patience=2)
    content = run(stopping, macro([1.0, 2.0, 2.0]))[0].as_dict()
    other = EarlyStopping(TASKS, 2, "write", task_patience=2, trained=TASKS[:1])
    state = other.resume(content)
    assert (state.metric, state.run) == ("write", Curve())
    assert state.tasks == stopping.resume(content).tasks
    assert other.after_evaluation(state, record(40, [5.0] * 3))[1].improved


def test_a_stopped_task_trains_again_when_its_patience_is_raised_or_taken_away():
    content = run(EarlyStopping(TASKS, task_patience=2), macro([1.0, 2.0, 2.0]))[0].as_dict()
    for patience, active in ((1, False), (2, False), (3, True), (None, True)):
        stopping = EarlyStopping(TASKS, task_patience=patience)
        state = stopping.resume(content)
        assert state.active_K.tolist() == 3 * [active]
        assert (stopping.finished(state) is None) == active


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"metric": "macr"}, "--early-stopping-metric macr: give macro, objective or a task of: write, explain, read$"),
        (
            {"metric": "read", "validated": ("write", "explain")},
            "metric read: evaluations see no sample of this task .* give macro, objective or a task .*write, explain$",
        ),
        ({"patience": 3, "validated": ()}, "--early-stopping-patience 3: no task has validation samples"),
        ({"task_patience": 3, "validated": ()}, "--task-early-stopping-patience 3: no task has validation samples"),
    ],
)
def test_refused(options, text):
    with pytest.raises(InputError, match=text):
        EarlyStopping(TASKS, **options)


def test_without_validation_data_the_defaults_are_accepted():
    assert EarlyStopping(TASKS, validated=()).finished(EarlyStopping(TASKS).begin()) is None

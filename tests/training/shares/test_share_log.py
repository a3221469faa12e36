"""When shares are judged, that no warning is repeated, and what a resumed run remembers of them."""

import types

import pytest

from mft_megatron.batch_sizes import BatchSizes
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.training.progress import Progress
from mft_megatron.training.shares import share_log
from mft_megatron.training.shares.share_log import ShareLog
from tests.made_dataset import write_dataset
from tests.training.shares.made_steps import reported

EQUAL = [0.25] * 4
OFF = [0.1, 0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("shares") / "set"
    write_dataset(prefix, 256)
    return PackedDataset.open(prefix, 256)


@pytest.fixture(autouse=True)
def judged_early(monkeypatch):
    monkeypatch.setattr(share_log, "FIRST_JUDGED", 4)


def arguments(normalization="global", loss="task-token"):
    return types.SimpleNamespace(
        multi_task=types.SimpleNamespace(mft_loss=loss, mft_normalization=normalization),
        logging=types.SimpleNamespace(log_interval=2),
        batch_sizes=BatchSizes([0], [1]),
    )


class Log(list):
    write = list.append


class Run:
    """A run of steps of one pack, whose shares are given."""

    def __init__(self, dataset, state=None, progress=None, **options):
        self.split, self.log, self.progress = dataset.split("train"), Log(), progress or Progress()
        self.shares = ShareLog(arguments(**options), dataset)
        self.shares.load(state or {}, self.log, self.progress)

    def step(self, share_K, over=False, **report):
        plan = plan_step(self.split, seed=1, global_batch_size=1, consumed_samples=self.progress.consumed_samples)
        made = None if share_K is None else reported(share_K, EQUAL, **report)
        self.shares.count(plan, made)
        skipped = made is None or made.overflow
        before, self.progress = self.progress, self.progress.after_step(1, skipped)
        self.shares.judge(self.log, before, self.progress, over)
        return self

    def steps(self, number, share_K, **report):
        for _ in range(number):
            self.step(share_K, **report)
        return self

    @property
    def warned(self):
        return [(record["step"], record["tasks"]) for record in self.log if "tasks" in record]


ALL = ["read", "completion", "write", "explain"]


def test_shares_are_judged_after_some_steps_at_a_line_of_the_log_and_once(dataset):
    run = Run(dataset).steps(3, OFF)
    assert run.log == []
    run.steps(30, OFF)
    assert [(step, set(tasks)) for step, tasks in run.warned] == [(4, set(ALL))]
    assert run.log[0]["reason"].startswith("realised shares of the objective in 4 steps so far: ")


def test_tasks_that_no_warning_was_about_are_named_later(dataset):
    run = Run(dataset).steps(4, [0.2, 0.3, 0.25, 0.25]).steps(30, OFF)
    (first, one), (second, other) = run.warned
    assert (first, set(one)) == (4, {"completion", "explain"})
    assert (second, set(other)) == (8, set(ALL) - {"explain"})
    run = Run(dataset).steps(4, [0.2, 0.3, 0.25, 0.25]).steps(30, [0.2, 0.3, 0.25, 0.25])
    assert len(run.warned) == 1


def test_an_end_of_an_epoch_and_of_the_run_are_times_to_judge(dataset, monkeypatch):
    monkeypatch.setattr(share_log, "FIRST_JUDGED", 10**6)
    packs = dataset.split("train").num_packs
    assert [step for step, _ in Run(dataset).steps(packs, OFF).warned] == [packs]
    assert [step for step, _ in Run(dataset).steps(2, OFF).step(OFF, over=True).warned] == [3]
    assert Run(dataset).steps(packs + 3, EQUAL).step(EQUAL, over=True).log == []


def test_under_epoch_normalisation_an_epoch_must_be_over(dataset):
    packs = dataset.split("train").num_packs
    off = [0.27, 0.27, 0.23, 0.23]
    run = Run(dataset, normalization="epoch").steps(packs - 1, off)
    assert run.log == []
    assert [step for step, _ in run.step(off).warned] == [packs]
    # more than an epoch has
    assert Run(dataset, normalization="epoch").steps(packs - 1, OFF).warned == [(64, ["read"])]
    over = Run(dataset, normalization="epoch").steps(5, OFF).step(OFF, over=True)
    assert f"the run ends after 6 of {packs} packs of an epoch" in over.log[0]["reason"]


def test_losses_without_weights_are_not_judged(dataset):
    assert Run(dataset, loss="token").steps(30, OFF).step(OFF, over=True).log == []


def test_steps_that_updated_nothing_do_not_count(dataset):
    run = Run(dataset).steps(3, EQUAL).steps(9, OFF, overflow=True).steps(9, None)
    assert run.shares.read().steps == 3
    assert run.shares.read().share_K.tolist() == EQUAL
    assert run.step(EQUAL).step(EQUAL, over=True).log == []


def test_a_resumed_run_continues_counting_and_repeats_no_warning(dataset):
    whole, first = Run(dataset).steps(20, OFF), Run(dataset).steps(7, OFF)
    again = Run(dataset, {"shares": first.shares.state()}, first.progress).steps(13, OFF)
    assert again.log == []
    assert again.shares.read().realised_K.tolist() == whole.shares.read().realised_K.tolist()
    other = Run(dataset, {"shares": first.shares.state()}, first.progress, loss="task-sample")
    assert "counted from here on, --mft-loss was task-token so far" in other.log[0]["reason"]
    assert other.shares.read().began == 7


def test_without_a_state_counting_begins_where_the_run_is(dataset):
    run = Run(dataset, progress=Progress(3, 3))
    assert [record["reason"] for record in run.log] == [
        "realised shares of the objective are counted from here on, the checkpoint has none"
    ]
    run.log.clear()
    assert "in 5 steps since pack 3: " in run.steps(5, OFF).log[0]["reason"]
    assert Run(dataset).log == []

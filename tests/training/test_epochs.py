"""The proof of an epoch over resumes: counts that continue, counts that start again, and epochs that are judged."""

import json
import types

import numpy as np
import pytest

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.micro_batches import UsageByEpoch
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.data.loading.usage import planned_usage
from mft_megatron.errors import InputError
from mft_megatron.training import epochs
from mft_megatron.training.epochs import EpochProof
from mft_megatron.training.progress import Progress
from tests.made_dataset import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("epochs") / "set"
    write_dataset(prefix, 256)
    return PackedDataset.open(prefix, 256)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(epochs.process_groups, "sum_over_data", lambda values: values.copy())
    monkeypatch.setattr(epochs.process_groups, "any_rank", bool)


class Log(list):
    write = list.append


class Run:
    """A run that does nothing but use data, 8 packs a step."""

    def __init__(self, dataset, consumed=0, state=None, seed=1):
        self.dataset, self.split, self.seed, self.log = dataset, dataset.split("train"), seed, Log()
        arguments = types.SimpleNamespace(initialization=types.SimpleNamespace(seed=seed))
        self.proof, self.progress = EpochProof(arguments, dataset), Progress(consumed // 8, consumed)
        self.trainer = types.SimpleNamespace(
            **{name: UsageByEpoch(len(dataset.tasks)) for name in ("usage", "left_out")}
        )
        self.proof.load(state or {}, self.log, self.progress)

    def step(self, spoil=lambda rows: rows):
        plan = plan_step(
            self.split, seed=self.seed, global_batch_size=8, consumed_samples=self.progress.consumed_samples
        )
        rows = spoil([self.split.slices_of(pack) for pack in plan.packs_G])
        self.trainer.usage.add(rows, plan.epochs_G, self.dataset.task_ids)
        before, self.progress = self.progress, self.progress.after_step(8, skipped=False)
        self.proof.after_step(self.trainer, self.log, before, self.progress)
        return self

    def until(self, consumed):
        while self.progress.consumed_samples < consumed:
            self.step()
        return self

    def state(self):
        return json.loads(json.dumps({"usage": self.proof.state(self.trainer, self.progress)}))

    @property
    def judged(self):
        return [(event["epoch"], event["complete"]) for event in self.log if event["event"] == "epoch"]

    @property
    def warnings(self):
        return [event["reason"] for event in self.log if event["event"] == "warning"]


def test_epochs_are_judged_one_by_one(dataset):
    packs = dataset.split("train").num_packs
    assert packs > 16
    run = Run(dataset).until(3 * packs)
    assert run.judged == [(0, True), (1, True), (2, True)]
    planned = planned_usage(run.split)
    event = run.log[0]
    assert [task["samples"] for task in event["tasks"].values()] == planned.slices_K.tolist()
    assert [int(task["digest"], 16) for task in event["tasks"].values()] == planned.digest_K.tolist()
    assert event["consumed_samples"] >= packs
    assert run.warnings == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 1.0, 1.2, 2.0])
def test_a_resume_goes_on_counting(dataset, share):
    packs = dataset.split("train").num_packs
    first = Run(dataset).until(int(share * packs))
    again = Run(dataset, first.progress.consumed_samples, first.state()).until(3 * packs)
    assert first.judged + again.judged == [(0, True), (1, True), (2, True)]
    assert again.warnings == []


def test_what_went_wrong_before_a_resume_is_seen_after_it(dataset):
    packs = dataset.split("train").num_packs
    first = Run(dataset).step(lambda rows: [rows[0], *rows[:-1]])
    with pytest.raises(InputError, match=r"epoch 0 did not use the data as planned: .* slices of") as refused:
        Run(dataset, 8, first.state()).until(packs)
    assert "\n" not in str(refused.value)


def test_the_counts_are_named(dataset):
    lost = {}

    def lose(rows):
        row = next(row for row in rows if len(row.samples) > 1)
        lost["task"] = dataset.tasks[dataset.task_ids[row.samples[0]]]
        return [row.take(slice(1, None)) if other is row else other for other in rows]

    planned = dict(zip(dataset.tasks, planned_usage(dataset.split("train")).slices_K, strict=True))
    with pytest.raises(InputError) as refused:
        Run(dataset).step(lose).until(planned_usage(dataset.split("train")).slices_K.sum())
    number = planned[lost["task"]]
    assert f"as planned: {lost['task']} used {number - 1} slices of {number};" in str(refused.value)


def test_an_exchange_leaves_the_counts_and_changes_the_digest(dataset):
    def shift(rows):
        return [rows[0]._replace(starts=rows[0].starts + 1), *rows[1:]]

    with pytest.raises(InputError, match="others than planned"):
        Run(dataset).step(shift).until(dataset.split("train").num_packs)


def test_without_counts_the_epoch_that_is_going_on_is_not_judged(dataset):
    packs = dataset.split("train").num_packs
    older = Run(dataset, 16, {}).until(2 * packs)
    assert older.judged == [(0, False), (1, True)]
    assert older.warnings == [
        "use of the data is counted from here on, the checkpoint has no counts; epoch 0 is not judged"
    ]
    # and the next resume still knows
    later = Run(dataset, 16, {}).step()
    assert Run(dataset, 24, later.state()).until(packs).judged == [(0, False)]


def test_another_seed_is_another_order(dataset):
    packs = dataset.split("train").num_packs
    first = Run(dataset).step()
    other = Run(dataset, 8, first.state(), seed=2).until(2 * packs)
    assert other.judged == [(0, False), (1, True)]
    assert "--seed was 1 so far; epoch 0 is not judged" in other.warnings[0]


def test_a_fresh_run_says_nothing(dataset):
    assert Run(dataset, 0, {}).log == []


def test_a_global_batch_of_several_epochs(dataset):
    split = dataset.split("train")
    run, size = Run(dataset), 2 * split.num_packs + 3
    plan = plan_step(split, seed=1, global_batch_size=size, consumed_samples=0)
    run.trainer.usage.add([split.slices_of(pack) for pack in plan.packs_G], plan.epochs_G, dataset.task_ids)
    run.progress = Progress(1, size)
    run.proof.after_step(run.trainer, run.log, Progress(), run.progress)
    assert run.judged == [(0, True), (1, True)]
    assert np.sum(run.state()["usage"]["pieces"]) == split.slices_of_packs(plan.packs_G[-3:])[1].sum()


def test_an_epoch_ends_with_a_look_at_the_files(tmp_path, monkeypatch):
    """A file that was written to is found by one rank, and refused on all; within an epoch nothing is said."""
    write_dataset(tmp_path / "set", 256)
    run = Run(PackedDataset.open(tmp_path / "set", 256))
    packs = run.split.num_packs
    run.until(packs - packs % 8 - 8)
    with open(tmp_path / "set_input_ids.bin", "r+b") as file:
        file.write(b"x")
    assert len(run.log) == 0
    monkeypatch.setattr(epochs.process_groups, "of_all_ranks", lambda message: [None, message])
    with pytest.raises(
        InputError, match=rf"^step \d+: {tmp_path}/set_input_ids.bin: was changed while it is"
    ) as caught:
        run.until(2 * packs)
    assert not caught.value.always
    assert len(run.log) == 0

"""Stored samples to packs: every slice as often as planned in every mode, compared with counts made by hand."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_megatron.data.packing.build_packs import build_packs
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.errors import InputError
from tests.data.stores import stored_of

MASK = st.lists(st.integers(0, 1), min_size=2, max_size=25).filter(lambda mask: any(mask[1:]))
TASKS = st.dictionaries(st.sampled_from("abcd"), st.lists(MASK, min_size=1, max_size=12), min_size=1)
DOCUMENTS = st.dictionaries(
    st.sampled_from("ab"), st.lists(st.integers(2, 30).map(lambda n: [1] * n), min_size=1, max_size=9), min_size=1
)


def slices_of(packed):
    """(sample, start, length) of each slice, by pack."""
    flat = list(zip(*(values.tolist() for values in packed.slices), strict=True))
    return [flat[start:end] for start, end in zip(packed.offsets[:-1], packed.offsets[1:], strict=True)]


@settings(deadline=None)
@given(TASKS, st.sampled_from(["pack", "padding"]), st.sampled_from(["mixed", "per-task"]), st.integers(25, 60))
def test_every_sample_is_in_one_row_of_one_split(tasks, padding_mode, packing, seq_length):
    stored = stored_of(tasks)
    options = PackingOptions(seq_length, split=(3, 1, 1), padding_mode=padding_mode, packing=packing)
    packs, entry, _ = build_packs(stored, options)
    rows = [row for packed in packs.values() for row in slices_of(packed)]
    samples = sorted(sample for row in rows for sample, _, _ in row)
    assert samples == list(range(len(stored.lengths)))
    assert all(sum(length for _, _, length in row) <= seq_length for row in rows)
    assert all(packed.whole for packed in packs.values())
    if padding_mode == "padding":
        assert all(len(row) == 1 for row in rows)
    if packing == "per-task":
        assert all(len({stored.task_ids[sample] for sample, _, _ in row}) == 1 for row in rows)
    for index, task in enumerate(entry.tasks):
        of_task = stored.task_ids == index
        assert (task.kept, task.tokens) == (of_task.sum(), stored.lengths[of_task].sum())
        assert sum(task.splits.values()) == task.kept
    for name, packed in packs.items():
        assert entry.packs[name].samples == len(packed.slices.samples)


def recount(stored, packed):
    """Entries of the counts: (pack, task, supervised tokens, samples that have any)."""
    rows = []
    for index, pack in enumerate(slices_of(packed)):
        by_task = collections.defaultdict(lambda: [0, 0])
        for sample, start, length in pack:
            first = int(stored.mask.start_of(sample)) + start
            targets = int(stored.mask.items[first + 1 : first + length].sum())
            by_task[int(stored.task_ids[sample])][0] += targets
            by_task[int(stored.task_ids[sample])][1] += targets > 0
        rows += [(index, task, *counts) for task, counts in sorted(by_task.items())]
    return rows


@settings(deadline=None)
@given(TASKS, st.integers(2, 30), st.sampled_from(["truncate", "truncate-left", "split"]))
def test_counts_are_those_of_the_slices(tasks, seq_length, overlong):
    stored = stored_of(tasks)
    try:
        packs, entry, _ = build_packs(stored, PackingOptions(seq_length, split=(1, 1, 0), overlong=overlong))
    except InputError as error:
        # most examples are not refused
        assert any(why in str(error) for why in ("is empty at --seq-length", "none of its samples in the train split"))  # noqa: PT017
        return
    for packed in packs.values():
        assert [tuple(row) for row in packed.counts.T.tolist()] == recount(stored, packed)
    targets = sum(packed.supervised_tokens for packed in entry.packs.values())
    assert targets == sum(task.supervised_tokens for task in entry.tasks)
    for task, cut in zip(stored.tasks, entry.tasks, strict=True):
        assert task.kept == cut.kept + sum(cut.dropped.values())


@settings(deadline=None)
@given(TASKS, st.floats(0.2, 4), st.integers(1, 3), st.sampled_from(["mixed", "per-task"]))
def test_samples_are_used_as_often_as_the_ledger_says(tasks, ratio, epochs, packing):
    stored = stored_of(tasks)
    chosen = next(iter(tasks))
    options = PackingOptions(
        25, split=(4, 1, 0), packing=packing, task_sampling={chosen: ratio}, sampling_epochs=epochs
    )
    packs, entry, notices = build_packs(stored, options)
    used = collections.Counter(packs["train"].slices.samples.tolist())
    for row in slices_of(packs["train"]):
        assert len({sample for sample, _, _ in row}) == len(row)  # no row holds a sample twice
    for index, (task, cut) in enumerate(zip(stored.tasks, entry.tasks, strict=True)):
        uses = [used[sample] for sample in used if stored.task_ids[sample] == index]
        expected = ratio if task.name == chosen else 1
        assert sum(uses) == max(round(expected * epochs * cut.splits["train"]), 1)
        times = collections.Counter(map(str, uses))
        assert {time: n for time, n in cut.uses.items() if time != "0"} == times
        unused = cut.splits["train"] - len(uses)
        assert cut.uses.get("0", 0) == unused
        assert any(f"task {task.name}: sampling leaves out {unused:,}" in line for line in notices) == (unused > 0)
    if "valid" in packs:
        assert collections.Counter(packs["valid"].slices.samples.tolist()).most_common(1)[0][1] == 1


@settings(deadline=None)
@given(DOCUMENTS, st.integers(2, 20))
def test_concatenated_rows_are_full_and_hold_every_token_as_a_target_once(documents, seq_length):
    stored = stored_of(documents)
    packs, entry, _ = build_packs(stored, PackingOptions(seq_length, split=(1, 0, 0), padding_mode="concat"))
    packed = packs["train"]
    rows = slices_of(packed)
    tasks = [{int(stored.task_ids[sample]) for sample, _, _ in row} for row in rows]
    assert all(len(of_row) == 1 for of_row in tasks)
    seen = collections.Counter()
    for number, row in enumerate(rows):
        tokens = [(sample, index) for sample, start, length in row for index in range(start, start + length)]
        last_of_task = number + 1 == len(rows) or tasks[number + 1] != tasks[number]
        assert len(tokens) == seq_length or last_of_task
        seen.update(tokens[1:])  # a row's first token is no target
    for number, task in enumerate(stored.tasks):
        samples = np.flatnonzero(stored.task_ids == number)
        targets = [n for (sample, _), n in seen.items() if sample in samples]
        assert set(targets) == {1}
        assert len(targets) == task.tokens - 1
    assert packed.counts[2].sum() == sum(task.tokens - 1 for task in stored.tasks)
    assert packed.counts[1].tolist() == [next(iter(of_row)) for of_row in tasks]
    assert (packed.counts[3] == 1).all()
    assert packed.counts[0].tolist() == list(range(len(rows)))
    assert packed.slices.lengths.min() > 0
    assert [cut.kept for cut in entry.tasks] == [task.kept for task in stored.tasks]


def test_the_seed_decides_the_order_of_concatenated_documents():
    stored = stored_of({"a": [[1] * 4] * 50})

    def order(seed):
        packs, _, _ = build_packs(stored, PackingOptions(4, split=(1, 0, 0), padding_mode="concat", seed=seed))
        return list(dict.fromkeys(packs["train"].slices.samples.tolist()))

    assert order(1) == order(1)
    assert sorted(order(1)) == list(range(50))
    assert len({tuple(order(1)), tuple(order(2)), tuple(range(50))}) == 3


def test_a_task_may_have_other_sampling_and_overlong_than_the_options():
    masks = [[0, 1, 1, 1, 1, 1]] * 4
    stored = stored_of({"a": masks, "b": masks}, a={"sampling": 2.0, "overlong": "split"}, b={"overlong": "truncate"})
    _, entry, _ = build_packs(stored, PackingOptions(4, split=(1, 0, 0)))
    assert [(cut.uses, cut.windowed, cut.truncated) for cut in entry.tasks] == [({"2": 4}, 4, 0), ({"1": 4}, 0, 4)]
    _, entry, _ = build_packs(stored, PackingOptions(4, split=(1, 0, 0), task_sampling={"a": 3.0}))
    assert entry.tasks[0].uses == {"3": 4}


def test_small_tasks_without_a_validation_sample_are_reported():
    stored = stored_of({"large": [[0, 1]] * 50, "tiny": [[0, 1]]})
    _, entry, notices = build_packs(stored, PackingOptions(8))
    assert [cut.splits["valid"] for cut in entry.tasks] == [1, 0]
    assert notices == ["task tiny: too few samples to have any in the valid split"]


CONTRADICTIONS = [
    ({"padding_mode": "concat"}, "--padding-mode concat: task a is not of text alone"),
    ({"padding_mode": "concat", "task_sampling": {"a": 2.0}}, "--padding-mode concat: every token is used once"),
    ({"padding_mode": "concat", "sampling_epochs": 2}, "--padding-mode concat: every token is used once"),
    ({"task_sampling": {"x": 2.0}}, "--task-sampling x: no such task; there are a"),
    ({"task_sampling": {"a": 2.0}, "sampling_temperature": 2.0}, "--sampling-temperature: gives every task its ratio"),
    ({"seq_length": 3, "split": (1.0, 1.0, 0.0), "seed": 0}, "task b: none of its samples in the train split fits"),
    ({"seq_length": 2}, "task a is empty at --seq-length 2: 1 samples, none kept (overlong 1)"),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS)
def test_contradictions_are_refused(options, message):
    tasks = {"a": [[0, 1, 1]]} if options.get("seq_length") != 3 else {"b": [[0, 1], [0, 1, 1, 1]]}
    stored = stored_of(tasks)
    with pytest.raises(InputError) as error:
        build_packs(stored, PackingOptions(**{"seq_length": 8, **options}))
    assert message in str(error.value)


def test_a_task_files_sampling_contradicts_options_that_would_override_it():
    documents = stored_of({"a": [[1, 1]] * 3}, a={"sampling": 2.0})
    for options, message in (
        ({"padding_mode": "concat"}, "--padding-mode concat: the task file has a sampling of its own for task a"),
        ({"sampling_temperature": 2.0}, "--sampling-temperature: the task file has a sampling of its own for task a"),
    ):
        with pytest.raises(InputError) as error:
            build_packs(documents, PackingOptions(8, **options))
        assert message in str(error.value)

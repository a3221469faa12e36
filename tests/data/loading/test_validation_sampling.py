"""Validation draws: samples of every task in each draw, every sample equally often, for any data-parallel size."""

import collections
import math
import types
from fractions import Fraction

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft_megatron.batch import Ranks
from mft_megatron.data.loading.build_batch import build_batch
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.validation_sampling import ValidationDraws, shard_rows
from mft_megatron.data.sample_slices import NO_SLICES, SampleSlices, concatenate_slices

WIDTH = 64


class Split:
    """The part of a split that draws need.

    ``samples`` has (task, mask) of each sample of the data set; a task of ``None`` stands for another split. Every
    sample is a separate pack: packs make no difference to draws.
    """

    def __init__(self, samples, num_tasks=None, dataset_hash="hash", name="valid"):
        masks = [mask for _, mask in samples]
        lengths = np.array([len(mask) for mask in masks], np.int32)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        self.members = [index for index, (task, _) in enumerate(samples) if task is not None]
        self.num_tasks = num_tasks or 1 + max(task for task, _ in samples if task is not None)
        self.num_packs, self.seq_length, self.name = len(self.members), WIDTH, name
        self.dataset = types.SimpleNamespace(
            dataset_hash=dataset_hash,
            seq_length=WIDTH,
            task_ids=np.array([task or 0 for task, _ in samples], np.uint16),
            joined=False,
            mask=types.SimpleNamespace(items=np.concatenate(masks).astype(np.uint8), start_of=starts.__getitem__),
        )
        self.lengths = lengths.astype(np.int64)
        self.num_slices = self.num_packs

    def slices(self, indices):
        samples = np.array(self.members, np.int64)[indices]
        return SampleSlices(samples, np.zeros_like(samples), self.lengths[samples])


def supervises(mask):
    """Whether a sample has a supervised target; its first token is no target."""
    return any(mask[1:])


def usable(samples):
    """Indices of the samples of each task that may be drawn."""
    by_task = collections.defaultdict(list)
    for index, (task, mask) in enumerate(samples):
        if task is not None and supervises(mask):
            by_task[task].append(index)
    return by_task


MASKS = st.one_of(
    st.integers(1, WIDTH).map(lambda n: [0] * n),
    st.integers(1, WIDTH).map(lambda n: [1] + [0] * (n - 1)),
    st.lists(st.integers(0, 1), min_size=2, max_size=WIDTH),
    st.integers(2, WIDTH).map(lambda n: [1] * n),
)
SAMPLES = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 4)), MASKS), min_size=1, max_size=40).filter(usable)
PACKS = st.integers(1, 5)


def drawn(draws, number):
    return concatenate_slices(draws.rows(number)).samples.tolist()


@settings(deadline=None)
@given(SAMPLES, PACKS, st.integers(0, 50))
def test_every_draw_holds_every_task_that_supervises(samples, num_packs, number):
    draws, known = ValidationDraws(Split(samples, 5), 1, num_packs), usable(samples)
    assert draws.known_K.tolist() == [task in known for task in range(5)]
    rows = draws.rows(number)
    taken = collections.Counter(samples[sample][0] for sample in concatenate_slices(rows).samples)
    assert taken == {task: draws.samples_K[task] for task in known}
    assert all(supervises(samples[sample][1]) for sample in concatenate_slices(rows).samples)
    assert all(0 < sum(len(samples[sample][1]) for sample in row.samples) <= WIDTH for row in rows)


@settings(deadline=None)
@given(SAMPLES, PACKS)
def test_tasks_have_the_same_budget_of_tokens(samples, num_packs):
    draws, known = ValidationDraws(Split(samples, 5), 1, num_packs), usable(samples)
    for task in range(5):
        own = [len(samples[index][1]) for index in known.get(task, ())]
        if not own:
            assert draws.samples_K[task] == 0
            continue
        share = Fraction(num_packs * WIDTH, len(known)) / Fraction(sum(own), len(own))
        # the division is in floating point: one less where it comes out whole
        assert draws.samples_K[task] in {min(max(n, 1), len(own)) for n in (math.floor(share), math.ceil(share) - 1)}


def test_budgets_by_hand():
    """Three packs of 64 for three tasks: 64 tokens each. 8 tokens a sample: 8; 40: one; and all of a small task."""
    samples = [(0, [1] * 8)] * 20 + [(1, [1] * 40)] * 5 + [(2, [1] * 4)] * 3 + [(3, [1, 0])]
    draws = ValidationDraws(Split(samples, 4), 1, 3)
    assert draws.samples_K.tolist() == [8, 1, 3, 0]
    assert len(draws.rows(0)) == 2  # 116 tokens


@settings(deadline=None)
@given(SAMPLES, PACKS, st.integers(1, 60))
def test_every_sample_is_drawn_equally_often(samples, num_packs, number_of_draws):
    """One pass of a task's samples after another: none comes twice before all have come once."""
    draws = ValidationDraws(Split(samples, 5), 1, num_packs)
    times = collections.Counter(sample for number in range(number_of_draws) for sample in drawn(draws, number))
    for task, own in usable(samples).items():
        passes, rest = divmod(number_of_draws * int(draws.samples_K[task]), len(own))
        expected = [passes + 1] * rest + [passes] * (len(own) - rest)
        assert sorted((times[sample] for sample in own), reverse=True) == expected


@settings(deadline=None)
@given(SAMPLES, PACKS, st.lists(st.integers(0, 99), min_size=1, max_size=5))
def test_a_draw_is_a_function_of_its_index(samples, num_packs, numbers):
    """Other objects give the same draw, after other draws."""
    draws = ValidationDraws(Split(samples, 5), 1, num_packs)
    first = [[row.samples.tolist() for row in draws.rows(number)] for number in numbers]
    for number, rows in reversed(list(zip(numbers, first, strict=True))):
        others = ValidationDraws(Split(samples, 5), 1, num_packs)
        assert [row.samples.tolist() for row in others.rows(number)] == rows


ALIKE = [(task, [1] * 8) for task in (0, 1) for _ in range(50)]


def test_draws_seeds_splits_data_sets_tasks_and_passes_differ():
    base = ValidationDraws(Split(ALIKE), 1, 2)
    assert base.samples_K.tolist() == [8, 8]
    others = [
        ValidationDraws(Split(ALIKE), 2, 2),
        ValidationDraws(Split(ALIKE, name="test"), 1, 2),
        ValidationDraws(Split(ALIKE, dataset_hash="other"), 1, 2),
    ]
    sets = [frozenset(drawn(base, number)) for number in (0, 1, 25)]  # draw 25 starts the fifth pass
    sets += [frozenset(drawn(draws, 0)) for draws in others]
    assert len(set(sets)) == len(sets)
    first = sorted(drawn(base, 0))
    assert [sample - 50 for sample in first[8:]] != first[:8]
    assert first != [*range(8), *range(50, 58)]


def test_draws_are_fixed_for_ever():
    """Golden: a run that is resumed with a newer version must go on with the same draws."""
    draws = ValidationDraws(Split(ALIKE), 1234, 1)
    assert sorted(drawn(draws, 0)) == [4, 20, 24, 39, 50, 56, 64, 69]
    assert sorted(drawn(draws, 13)) == [19, 22, 28, 36, 59, 60, 70, 71]


def test_a_draw_grows_where_tasks_are_many():
    """Nine tasks whose samples fill most of a row: nine rows instead of the one that was requested."""
    samples = [(task, [1] * 50) for task in range(9) for _ in range(4)]
    draws = ValidationDraws(Split(samples), 1, 1)
    assert draws.samples_K.tolist() == [1] * 9
    assert [len(draws.rows(number)) for number in range(5)] == [9] * 5


@settings(deadline=None)
@given(st.integers(0, 30), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 4))
def test_ranks_have_every_row_once(num_rows, data_size, micro_batch_size, times):
    """The number of micro-batches must be a multiple of ``times``, as in interleaved pipelines."""
    rows = [SampleSlices(*(np.array([value]) for value in (number, 0, 1))) for number in range(num_rows)]
    multiple = data_size * micro_batch_size * times
    shards = [shard_rows(rows, Ranks(rank, data_size), micro_batch_size, multiple) for rank in range(data_size)]
    assert {len(shard) for shard in shards} == {-(-num_rows // multiple) * times}
    assert all(len(micro_batch) == micro_batch_size for shard in shards for micro_batch in shard)
    everything = [row for shard in shards for micro_batch in shard for row in micro_batch]
    assert sorted(concatenate_slices([*everything, NO_SLICES]).samples.tolist()) == list(range(num_rows))
    assert sum(row.num_tokens == 0 for row in everything) < multiple
    assert len(rows) == num_rows  # the caller's list is unchanged


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20)
@given(number=st.integers(0, 40), num_packs=st.integers(1, 4), data_size=st.sampled_from([1, 2, 3]))
def test_draws_of_a_real_split(dataset, number, num_packs, data_size):
    """The shards of all ranks supervise every task that the split has, and are of this split only."""
    split = dataset.split("valid")
    draws = ValidationDraws(split, 1, num_packs)
    rows = draws.rows(number)
    tokens = np.zeros(split.num_tasks, np.int64)
    for rank in range(data_size):
        for micro_batch in shard_rows(rows, Ranks(rank, data_size), 2, 2 * data_size):
            batch = build_batch(dataset, micro_batch)
            assert batch.tokens_BS.shape == (2, split.seq_length)
            tokens += np.bincount(batch.task_ids_BS[batch.loss_mask_BS == 1], minlength=split.num_tasks)
    whole = split.totals.tokens_K
    assert ((tokens > 0) == (whole > 0)).all()
    assert set(drawn(draws, number)) <= set(split.slices(slice(0, split.num_slices)).samples.tolist())


def test_a_split_that_supervises_nothing_has_no_draws():
    draws = ValidationDraws(Split([(0, [1, 0, 0]), (1, [0])], 2), 1, 1)
    assert not draws.known_K.any()
    assert draws.samples_K.tolist() == [0, 0]


def test_draws_of_windows_and_of_joined_packs(make_dataset):
    """Each window is drawn separately, with its part of the sample; of joined documents whole packs are drawn."""
    texts = {name: [{"text": "x = 1\n" * n} for n in range(30, 60)] for name in "ab"}
    cut, joined = (
        PackedDataset.open(make_dataset(texts, seq_length=64, split=(1, 1, 0), **options)[0], 64)
        for options in ({"overlong": "split"}, {"padding_mode": "concat"})
    )
    split = cut.split("valid")
    draws = ValidationDraws(split, 1, 4)
    known = set(zip(*(values.tolist() for values in split.slices(slice(0, split.num_slices))), strict=True))
    slices = concatenate_slices([row for number in range(50) for row in draws.rows(number)])
    assert set(zip(*(values.tolist() for values in slices), strict=True)) == known
    split = joined.split("valid")
    rows = ValidationDraws(split, 1, 4).rows(3)
    packs = [split.slices_of(pack) for pack in range(split.num_packs)]
    assert len(rows) == 4
    for row in rows:
        assert any(all(np.array_equal(a, b) for a, b in zip(row, pack, strict=True)) for pack in packs)
    batch = build_batch(joined, rows)
    assert np.bincount(batch.task_ids_BS[batch.loss_mask_BS == 1]).min() > 0

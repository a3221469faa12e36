"""The C++ sample index against slow, obvious references."""

import ast
import collections
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft_megatron.data import _sample_index
from mft_megatron.data._sample_index import (
    balance,
    best_fit_decreasing,
    best_fit_mixed,
    count_packs,
    epoch_order,
    mixed_order,
    rarest_tasks,
)


@st.composite
def lengths_and_capacity(draw):
    capacity = draw(st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 4096, 4097, 300_000])))
    length = st.one_of(st.integers(1, capacity), st.integers(1, min(capacity, 5)), st.just(capacity))
    return np.array(draw(st.lists(length, max_size=60)), np.int32), capacity


def packs_of(sample_numbers, offsets):
    return [sample_numbers[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def reference_best_fit(lengths, capacity, order=None):
    """Try every open pack for every sample; of equally full packs, take the one that got a sample last.

    ``order`` is that of the samples, from the longest to the shortest by default.
    """
    packs, space, touched = [], [], []
    for clock, sample in enumerate(order or sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [p for p in range(len(packs)) if space[p] >= lengths[sample]]
        if fitting:
            pack = min(fitting, key=lambda p: (space[p], -touched[p]))
        else:
            pack = len(packs)
            packs.append([])
            space.append(capacity)
            touched.append(0)
        packs[pack].append(sample)
        space[pack] -= lengths[sample]
        touched[pack] = clock
    return packs


@given(lengths_and_capacity())
def test_equals_the_slow_reference(case):
    lengths, capacity = case
    assert packs_of(*best_fit_decreasing(lengths, capacity)) == reference_best_fit(lengths.tolist(), capacity)


@given(lengths_and_capacity())
def test_every_sample_once_and_no_pack_too_full(case):
    lengths, capacity = case
    sample_numbers, offsets = best_fit_decreasing(lengths, capacity)
    assert sample_numbers.dtype == offsets.dtype == np.int64
    assert sorted(sample_numbers) == list(range(len(lengths)))
    packs = packs_of(sample_numbers, offsets)
    assert all(0 < lengths[pack].sum() <= capacity for pack in packs)
    # no two packs of best fit could share a row
    fills = sorted(int(lengths[pack].sum()) for pack in packs)
    assert len(fills) < 2 or fills[0] + fills[1] > capacity


@given(lengths_and_capacity())
def test_needs_few_packs(case):
    """Best-fit decreasing stays within 11/9 of the optimum + 6/9; the optimum is no more than what next fit needs."""
    lengths, capacity = case
    next_fit, space = 0, 0
    for length in lengths.tolist():
        if space < length:
            next_fit, space = next_fit + 1, capacity
        space -= length
    packs = len(best_fit_decreasing(lengths, capacity)[1]) - 1
    assert -(-int(lengths.sum()) // capacity) <= packs
    assert 9 * packs <= 11 * next_fit + 6


def test_large_input_is_filled_almost_completely():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.0, 50_000).astype(np.int32) + 1, 4096)
    offsets = best_fit_decreasing(lengths, 4096)[1]
    assert lengths.sum() / ((len(offsets) - 1) * 4096) > 0.999


@pytest.mark.parametrize(
    ("lengths", "capacity", "numbers"),
    [([3, 0], 8, ("sample 1", "0", "8")), ([3, 9], 8, ("sample 1", "9", "8")), ([-2], 8, ("-2",)), ([1], 0, ("0",))],
)
def test_impossible_lengths_are_refused_with_the_numbers(lengths, capacity, numbers):
    with pytest.raises(ValueError, match=".*".join(numbers)):
        best_fit_decreasing(np.array(lengths, np.int32), capacity)


def test_the_bound_is_reached_at_4096():
    """Lengths like those of multi-task data, log-normal around 400 tokens."""
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 100_000), 1, 4096).astype(np.int32)
    offsets = best_fit_decreasing(lengths, 4096)[1]
    assert lengths.sum() / ((len(offsets) - 1) * 4096) > 0.9999


@st.composite
def costs_and_ranks(draw):
    ranks, each = draw(st.integers(1, 9)), draw(st.integers(0, 6))
    cost = st.one_of(st.integers(0, 5), st.integers(0, 2**40))
    return np.array(draw(st.lists(cost, min_size=ranks * each, max_size=ranks * each)), np.int64), ranks


@given(costs_and_ranks())
def test_balance_equals_the_slow_reference(case):
    costs, ranks = case
    each, rows = len(costs) // ranks, [[] for _ in range(ranks)]
    for row in sorted(range(len(costs)), key=lambda i: -costs[i]):
        open_ranks = [rank for rank in range(ranks) if len(rows[rank]) < each]
        rows[min(open_ranks, key=lambda rank: (costs[rows[rank]].sum(), rank))].append(row)
    balanced = balance(costs, ranks)
    assert balanced.dtype == np.int64
    assert balanced.shape == (ranks, each)
    assert balanced.tolist() == rows


@pytest.mark.parametrize(
    ("costs", "ranks", "message"), [([1, 2, 3], 2, "3 rows"), ([1], 0, "0 ranks"), ([1, -1], 2, "negative")]
)
def test_balance_refuses_impossible_arguments(costs, ranks, message):
    with pytest.raises(ValueError, match=message):
        balance(np.array(costs, np.int64), ranks)


@pytest.mark.parametrize(
    "lengths", [np.array([1, 2], np.int64), np.array([1.0]), np.arange(1, 9, dtype=np.int32)[::2], [1, 2]]
)
def test_arrays_are_never_converted_silently(lengths):
    with pytest.raises(TypeError):
        best_fit_decreasing(lengths, 8)


def test_two_axes_are_refused():
    with pytest.raises(ValueError, match="2 axes"):
        best_fit_decreasing(np.ones((2, 2), np.int32), 8)


@given(lengths_and_capacity(), st.integers(0, 2**32), st.integers(1, 5))
def test_counts_equal_a_slow_recount(case, seed, num_tasks):
    lengths, capacity = case
    random = np.random.default_rng(seed)
    task = random.integers(0, num_tasks, len(lengths)).astype(np.uint16)
    supervised = random.integers(0, 3, len(lengths))
    sample_numbers, offsets = best_fit_decreasing(lengths, capacity)
    expected = []
    for index, pack in enumerate(packs_of(sample_numbers, offsets)):
        for k in sorted({int(task[s]) for s in pack}):
            in_task = [int(supervised[s]) for s in pack if task[s] == k]
            expected.append([index, k, sum(in_task), sum(tokens > 0 for tokens in in_task)])
    counts = count_packs(sample_numbers, offsets, task, supervised)
    assert counts.dtype == np.int64
    assert counts.shape == (4, len(expected))
    assert counts.T.tolist() == expected


@pytest.mark.parametrize(
    ("sample_numbers", "offsets", "message"),
    [
        ([0, 3], [0, 2], "sample number 3"),
        ([0, -1], [0, 2], "sample number -1"),
        ([0, 1], [0, 1], "from 0 to 2"),
        ([0, 1], [1, 2], "from 0 to 2"),
        ([0, 1], [], "from 0 to 2"),
        ([0, 1], [0, 2, 1, 2], "offset 1 of pack 2"),
        ([0, 1], [0, 9, 2], "offset 9 of pack 1"),
        ([0, 1], [0, -9, 2], "offset -9 of pack 1"),
    ],
)
def test_counts_refuse_indices_out_of_range(sample_numbers, offsets, message):
    task, supervised = np.zeros(3, np.uint16), np.ones(3, np.int64)
    with pytest.raises(ValueError, match=message):
        count_packs(np.array(sample_numbers, np.int64), np.array(offsets, np.int64), task, supervised[:3])


def test_counts_refuse_arrays_of_different_lengths():
    with pytest.raises(ValueError, match="differ in length"):
        count_packs(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(3, np.uint16), np.ones(2, np.int64))


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_epoch_order_is_a_permutation(n, seed):
    assert sorted(epoch_order(n, seed)) == list(range(n))


def mt19937_64(seed):
    """The generator as the C++ standard defines it, in words of 64 bits."""
    bits, n, m, lower = 2**64 - 1, 312, 156, 2**31 - 1
    state = [seed]
    for i in range(1, n):
        state.append((6364136223846793005 * (state[-1] ^ state[-1] >> 62) + i) & bits)
    while True:
        for i in range(n):
            x = state[i] & ~lower & bits | state[(i + 1) % n] & lower
            state[i] = state[(i + m) % n] ^ x >> 1 ^ (0xB5026F5AA96619E9 if x & 1 else 0)
        for x in state:
            x ^= x >> 29 & 0x5555555555555555
            x ^= x << 17 & 0x71D67FFFEDA60000 & bits
            x ^= x << 37 & 0xFFF7EEE000000000 & bits
            yield x ^ x >> 43


def test_the_reference_generator_is_the_standard_one():
    assert next(itertools.islice(mt19937_64(5489), 9999, None)) == 9981545732273789042  # the standard's check value


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_epoch_order_is_the_same_on_every_machine(n, seed):
    """A change here would change the data order of every run that is resumed."""
    assert epoch_order(n, seed).tolist() == reference_order(n, mt19937_64(seed))


def reference_order(n, numbers):
    """The permutation of ``epoch_order``, from the numbers of a generator that goes on afterwards."""
    order = list(range(n))
    for left in range(n, 1, -1):
        limit = (2**64 - 1) // left * left
        other = next(number for number in numbers if number < limit) % left
        order[left - 1], order[other] = order[other], order[left - 1]
    return order


def reference_keys(groups, seed):
    """(key, place in the permutation, item) of each item, with keys as integers of any size."""
    numbers, rank, size, keyed = mt19937_64(seed), collections.Counter(), collections.Counter(groups), []
    for place, item in enumerate(reference_order(len(groups), numbers)):
        group = groups[item]
        u = next(numbers) >> 32
        keyed.append((((rank[group] << 32 | u) << 32) // size[group], place, item))
        rank[group] += 1
    return keyed


GROUPS = st.lists(st.one_of(st.integers(0, 3), st.sampled_from([7, 2**16])), max_size=150)


@given(GROUPS, st.integers(0, 2**64 - 1))
def test_mixed_order_is_the_same_on_every_machine(groups, seed):
    order = mixed_order(np.array(groups, np.int32), seed)
    assert order.dtype == np.int64
    assert order.tolist() == [item for _, _, item in sorted(reference_keys(groups, seed))]


def test_every_bit_of_a_key_and_the_place_count():
    """So many items that two keys agree in their upper half, and two agree wholly: a seed that has both."""
    groups = [*range(20_000), *[20_000] * 12_000]
    keyed = reference_keys(groups, 161)
    order = [item for _, _, item in sorted(keyed)]
    assert order != [item for _, _, item in sorted((key >> 32, place, item) for key, place, item in keyed)]
    assert order != [item for _, _, item in sorted((key, -place, item) for key, place, item in keyed)]
    assert mixed_order(np.array(groups, np.int32), 161).tolist() == order


def test_a_mixed_order_spreads_every_group_evenly():
    """Every tenth of the order has a tenth of each group, up to one item; a group of one is anywhere."""
    sizes = [5000, 700, 60, 10, 1]
    groups = np.repeat(np.arange(5, dtype=np.int32), sizes)
    order = mixed_order(groups, 3)
    assert sorted(order) == list(range(len(groups)))
    counts = np.array([np.bincount(groups[part], minlength=5) for part in np.array_split(order, 10)])
    assert (abs(counts - np.array(sizes) / 10) <= np.array([12, 4, 2, 1, 1])).all()
    places = [mixed_order(groups, seed).argmax() for seed in range(200)]  # the last item is the group of one
    assert abs(np.mean(places) / len(groups) - 0.5) < 0.1
    assert np.std(places) / len(groups) > 0.2
    # within a group the order is random
    of_first = order[groups[order] == 0]
    assert abs(np.corrcoef(of_first, np.arange(5000))[0, 1]) < 0.05


@given(lengths_and_capacity(), st.integers(1, 4), st.integers(0, 2**64 - 1))
def test_best_fit_mixed_equals_the_slow_reference(case, num_groups, seed):
    lengths, capacity = case
    groups = np.arange(len(lengths), dtype=np.int32) % num_groups
    mixed = mixed_order(groups, seed).tolist()
    long = sorted((i for i in mixed if 4 * lengths[i] > capacity), key=lambda i: -lengths[i])
    order = long + [i for i in mixed if 4 * lengths[i] <= capacity]
    found = packs_of(*best_fit_mixed(lengths, groups, capacity, seed))
    assert found == reference_best_fit(lengths.tolist(), capacity, order)


@pytest.mark.parametrize(
    ("lengths", "groups", "message"),
    [
        ([1, 2], [0], "differ in length"),
        ([1, 9], [0, 0], "sample 1 has length 9"),
        ([1, 2], [0, -1], "item 1 has group -1, not within 0 .. 65536"),
        ([1, 2], [0, 65537], "item 1 has group 65537"),
    ],
)
def test_best_fit_mixed_refuses_impossible_arguments(lengths, groups, message):
    with pytest.raises(ValueError, match=message):
        best_fit_mixed(np.array(lengths, np.int32), np.array(groups, np.int32), 8, 0)


@given(st.lists(st.dictionaries(st.sampled_from([0, 1, 2, 3, 65535]), st.integers(0, 2), max_size=4), max_size=20))
def test_rarest_tasks_equal_a_slow_search(tokens_of_packs):
    held = [{task for task, tokens in pack.items() if tokens} for pack in tokens_of_packs]
    packs = collections.Counter(task for tasks in held for task in tasks)
    expected = [min(tasks, key=lambda task: (packs[task], task), default=2**16) for tasks in held]
    entries = [(p, task, tokens) for p, pack in enumerate(tokens_of_packs) for task, tokens in sorted(pack.items())]
    columns = np.array(entries, np.int64).reshape(-1, 3).T
    rarest = rarest_tasks(*map(np.ascontiguousarray, columns), len(tokens_of_packs))
    assert rarest.dtype == np.int32
    assert rarest.tolist() == expected
    mixed_order(rarest, 0)  # packs without a supervised token are a group


@pytest.mark.parametrize(("pack", "task", "num_packs"), [(2, 0, 2), (-1, 0, 2), (0, -1, 2), (0, 65536, 2), (0, 0, -1)])
def test_rarest_tasks_refuse_what_is_out_of_range(pack, task, num_packs):
    with pytest.raises(ValueError, match=f"{pack} and task {task}|num_packs -1"):
        rarest_tasks(*(np.array([value], np.int64) for value in (pack, task, 1)), num_packs)
    with pytest.raises(ValueError, match="differ in length"):
        rarest_tasks(np.zeros(1, np.int64), np.zeros(2, np.int64), np.zeros(1, np.int64), 1)


def test_epoch_order_is_uniform():
    """Over many seeds, each element is equally often at each index (chi-square test)."""
    n, num_seeds = 8, 20_000
    seen = np.zeros((n, n))
    for seed in range(num_seeds):
        seen[np.arange(n), epoch_order(n, seed)] += 1
    expected = num_seeds / n
    assert ((seen - expected) ** 2 / expected).sum() < 130  # 49 degrees of freedom: the odds are below 1e-8


def test_negative_size_is_refused():
    with pytest.raises(ValueError, match="-1"):
        epoch_order(-1, 0)


def test_the_stub_describes_the_module():
    stub = Path(_sample_index.__file__).with_name("_sample_index.pyi")
    functions = {node.name: node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert set(functions) == {name for name in vars(_sample_index) if not name.startswith("_")}
    for name, function in functions.items():
        signature = getattr(_sample_index, name).__doc__.splitlines()[0]
        names = [argument.arg for argument in function.args.args]
        assert [word.rpartition(" ")[2].rpartition("(")[2] for word in signature.split(":")[:-1]] == names, signature

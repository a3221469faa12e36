"""The number of packs of a step, from the packs consumed before it."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from megatron.core import num_microbatches_calculator

from mft_megatron.batch_sizes import BatchSizes, ramp_up, step_schedule
from mft_megatron.errors import InputError

Theirs = getattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator", None)


def first_sizes(sizes, steps):
    """Return the sizes of the first steps of a run."""
    consumed, seen = 0, []
    for _ in range(steps):
        seen.append(sizes.after(consumed))
        consumed += seen[-1]
    return seen


def test_a_ramp_up():
    assert first_sizes(ramp_up(4, 4, 24, 12), 8) == [4, 4, 4, 8, 8, 12, 12, 12]  # 8 from 12 packs on, 12 from 24 on
    assert first_sizes(BatchSizes([0], [6]), 3) == [6, 6, 6]


@pytest.mark.skipif(Theirs is None, reason="this Megatron-Core has no ramp-up to compare with")
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 12), st.integers(1, 500), st.integers(0, 600))
@example(2, 2, 3, 10, 10)
def test_a_ramp_up_agrees_with_megatron(start, increment, steps, samples, consumed):
    # Megatron divides in floating point, which may give either size at the border of two.
    assume(consumed >= samples or consumed * steps % samples)
    end = start + steps * increment
    theirs = Theirs(end, 1, 1, False, 1, start, increment, samples)
    if consumed == samples:
        assert ramp_up(start, increment, samples, end).after(consumed) == end
        return
    theirs.update(consumed, consistency_check=False)
    assert ramp_up(start, increment, samples, end).after(consumed) == theirs.get_current_global_batch_size()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 60))
def test_a_ramp_up_is_exact_at_its_borders(start, increment, steps, samples):
    sizes = ramp_up(start, increment, samples, start + steps * increment)
    for consumed in range(samples + 3):
        assert sizes.after(consumed) == start + increment * min(consumed * steps // samples, steps)


@given(
    st.dictionaries(st.integers(1, 60), st.integers(1, 20), max_size=6),
    st.integers(1, 20),
    st.integers(0, 80),
    st.integers(0, 90),
)
def test_the_number_of_steps_is_that_of_the_run(later, first, start, length):
    starts = [0, *sorted(later)]
    sizes = BatchSizes(starts, [first, *(later[key] for key in starts[1:])])
    consumed, steps = start, 0
    while consumed < start + length:
        consumed += sizes.after(consumed)
        steps += 1
    assert sizes.steps(start, start + length) == steps
    assert sizes.consumed(start, steps) == consumed


PAIRS = st.dictionaries(st.integers(1, 50), st.integers(1, 99), max_size=6)


@given(PAIRS, st.integers(1, 99), st.integers(1, 9), st.integers(0, 60), st.randoms())
def test_a_schedule_by_tokens(later, first, seq_length, consumed, random):
    pairs = [(0, first), *later.items()]
    random.shuffle(pairs)
    text = random.choice([" ", ",", ", "]).join(f"{start * seq_length}:{size}" for start, size in pairs)
    sizes = step_schedule(text, seq_length)
    assert sizes.after(consumed) == dict(pairs)[max(start for start, _ in pairs if start <= consumed)]
    remaining = [size for start, size in sorted(pairs) if start > consumed]
    assert list(sizes.remaining(consumed)) == [sizes.after(consumed), *remaining]


def test_suffixes_are_exact_and_packs_are_whole():
    sizes = step_schedule("0:16 2.4B:320 0.3t:1K", 4096)
    assert sizes.starts == [0, 585937, 73242187]  # of 585937.5 and 73242187.5 packs
    assert sizes.sizes == [16, 320, 1000]
    assert step_schedule("0:1 1.1K:2 4.35m:3", 1).starts == [0, 1100, 4350000]


REFUSED = {
    "": "the first threshold must be 0, as in 0:16 2.4B:320",
    "8:4": "the first threshold must be 0",
    "0:4 16": "'16' is not THRESHOLD:SIZE",
    "0:4 :8": "':8' is not THRESHOLD:SIZE",
    "0:4 9:": "'9:' is not THRESHOLD:SIZE",
    "0:0": "'0:0' is not",
    "0:4.5": "'0:4.5' is not",
    "-1:4": "'-1:4' is not",
    "0:4 nan:8": "'nan:8' is not",
    "0:4 1e99:8": "'1e99:8' is not",
    "0:4 x:8": "'x:8' is not",
    "0:4 16:8 1:9": "thresholds 0 and 1 are less than a pack of 8 tokens apart",
    "0:4 1K:8 1000:9": "thresholds 1K and 1000 are less than a pack",
}


@pytest.mark.parametrize("text", REFUSED)
def test_malformed_schedules_are_refused(text):
    with pytest.raises(InputError) as refusal:
        step_schedule(text, 8)
    assert REFUSED[text] in str(refusal.value)
    assert "\n" not in str(refusal.value)

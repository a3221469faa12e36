"""The plan of a pass, checked without trusting it: every pack once, every token of every sample as often as sampled."""

import dataclasses
from collections import Counter

import numpy as np

from mft_megatron.data.loading.dataset import PackedSplit
from mft_megatron.data.loading.step_plan import plan_step


@dataclasses.dataclass(frozen=True)
class PassReport:
    """Contents of a pass of training.

    Attributes:
        packs, slices, samples: how many there are; a sample counts once.
        problems: a line for each thing that is not as it should be.
    """

    packs: int
    slices: int
    samples: int
    problems: tuple[str, ...]


def check_pass(split: PackedSplit, seed: int, step_packs: int, order_version: int) -> PassReport:
    """Go through the first pass of training step by step, and count what its packs hold.

    Args:
        split: that is trained on.
        seed: of the run.
        step_packs: packs of a step.
        order_version: of the order of the packs.
    """
    problems = [*_packs(split, seed, step_packs, order_version)]
    slices = split.slices(slice(None))
    problems += _rows(split, slices.lengths)
    if not split.dataset.joined:
        problems += _overlaps(split, slices.samples, slices.starts, slices.lengths)
        problems += _uses(split, slices.samples, slices.starts)
    return PassReport(split.num_packs, len(slices.samples), len(np.unique(slices.samples)), tuple(problems))


def _packs(split: PackedSplit, seed: int, step_packs: int, order_version: int) -> list[str]:
    uses = np.zeros(split.num_packs, np.int64)
    for consumed in range(0, split.num_packs, step_packs):
        size = min(step_packs, split.num_packs - consumed)
        plan = plan_step(
            split, seed=seed, global_batch_size=size, consumed_samples=consumed, order_version=order_version
        )
        np.add.at(uses, plan.packs_G, 1)
    wrong = np.flatnonzero(uses != 1)
    return [f"pack {wrong[0]} is used {uses[wrong[0]]} times in a pass ({len(wrong)} such packs)"] if len(wrong) else []


def _rows(split: PackedSplit, lengths: np.ndarray) -> list[str]:
    """Rows that are longer than the sequence length."""
    _, counts = split.slices_of_packs(np.arange(split.num_packs))
    tokens = np.bincount(np.repeat(np.arange(split.num_packs), counts), weights=lengths, minlength=split.num_packs)
    full = np.flatnonzero(tokens > split.seq_length)
    return [f"pack {full[0]} has {tokens[full[0]]:.0f} tokens, more than {split.seq_length}"] if len(full) else []


def _overlaps(split: PackedSplit, samples: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Slices that reach beyond their sample, and samples that a row holds twice."""
    beyond = np.flatnonzero((starts < 0) | (starts + lengths > split.dataset.tokens.lengths[samples]))
    problems = [f"a slice of sample {samples[beyond[0]]} reaches beyond its end"] if len(beyond) else []
    _, counts = split.slices_of_packs(np.arange(split.num_packs))
    pack = np.repeat(np.arange(split.num_packs), counts)
    order = np.lexsort((starts, samples, pack))
    same = np.all([value[order][1:] == value[order][:-1] for value in (pack, samples, starts)], axis=0)
    twice = np.flatnonzero(same)
    if len(twice):
        first = order[twice[0]]
        problems.append(f"pack {pack[first]} holds sample {samples[first]} twice ({len(twice)} such slices)")
    return problems


def _uses(split: PackedSplit, samples: np.ndarray, starts: np.ndarray) -> list[str]:
    """Compare how many samples a pass uses how often with the ledger, task by task."""
    if split.name != "train":
        return []
    dataset, problems = split.dataset, []
    keys, number = np.unique(samples << 32 | starts, return_counts=True)
    sample = keys >> 32
    # all slices of a sample are used equally often
    first = np.flatnonzero(np.diff(sample, prepend=-1))
    uneven = np.flatnonzero(number != np.repeat(number[first], np.diff(np.append(first, len(number)))))
    if len(uneven):
        problems.append(f"sample {sample[uneven[0]]}: its slices are used unequally often")
    used, uses = sample[first], number[first]
    for task, (name, cut) in enumerate(zip(dataset.tasks, dataset.entry.tasks, strict=True)):
        found = Counter(uses[dataset.task_ids[used] == task].tolist())
        planned = {int(times): count for times, count in cut.uses.items() if int(times) and count}
        if dict(found) != planned:
            problems.append(f"task {name}: {_words(found)}; the data set was packed for {_words(planned)}")
    return problems


def _words(uses: dict[int, int]) -> str:
    return ", ".join(f"{count} samples {times}×" for times, count in sorted(uses.items())) or "no samples"

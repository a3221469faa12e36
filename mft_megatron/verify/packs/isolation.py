"""Do samples that share a row see each other? Losses of a row as it is, with one sample replaced, and unpacked.

::

    row  | sample 0 | sample 1 | sample 2 | padding |  ─► token losses ──┬─ others: must not move
    row  | sample 0 | replaced | sample 2 | padding |  ─► token losses ──┘  itself: must move
    rows | sample 0 |   | sample 1 |   | sample 2 |    ─► token losses ───  must be those of the row

A leak of attention, a label of the next sample or state that crosses a border moves the losses of another sample. If
the replaced sample's own losses did not move, the comparison would show nothing. The unpacked rows are built here, from
the stored tokens and mask alone, so that what the loader does with labels, masks and positions is compared as well.
Rotary positions are relative: where they do not restart, losses hardly change, so they are also compared directly.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mft_megatron.batch import Batch
from mft_megatron.data.loading.build_batch import build_batch
from mft_megatron.data.loading.dataset import PackedDataset, PackedSplit
from mft_megatron.data.permutation import named_permutation
from mft_megatron.data.sample_slices import SampleSlices

from .perturbation import item_ranges, replace_slice

# token losses of a micro-batch, fp32 [B, S] in nats, 0 where no target is supervised
Losses = Callable[[Batch[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Largest differences of losses that are allowed, in nats; above a loss of 1 relative to it.

    Attributes:
        others: of a sample when another one is replaced, at any token; 0 asks for the same bits.
        noisy: the same where two passes over one row give different bits.
        unpacked: of a sample in the row and alone.
        mean: whether ``unpacked`` bounds the mean over the row's supervised tokens instead of the largest.
    """

    others: float
    noisy: float
    unpacked: float
    mean: bool

    def of_others(self, repeatable: bool) -> float:
        """Largest allowed change of another sample, in a row that gives the same bits twice or not."""
        return self.others if repeatable else self.noisy

    def of_itself(self, repeatable: bool) -> float:
        """The least that the replaced sample must move by at some token."""
        return max(1e-3, 3 * self.of_others(repeatable))


@dataclasses.dataclass(frozen=True)
class RowReport:
    """Differences of one row.

    Attributes:
        pack: index of the row in its split.
        tasks: name of the task of each sample slice.
        samples: index of each in the data set.
        replaced: the replaced slice, counted in the row from 0.
        moved: of the other slices, the one whose losses moved most; ``None`` where none moved.
        others: by how much it moved.
        itself: by how much the replaced slice moved.
        unpacked: difference from the unpacked slices; the largest, or the mean.
        misplaced: slices whose positions do not count from 0.
        finite: whether all losses are finite.
        repeatable: whether the row gave the same bits twice.
    """

    pack: int
    tasks: tuple[str, ...]
    samples: tuple[int, ...]
    replaced: int
    moved: int | None
    others: float
    itself: float
    unpacked: float
    misplaced: tuple[int, ...]
    finite: bool
    repeatable: bool

    def failures(self, bounds: Bounds) -> list[str]:
        """Sentences that say how samples of the row see each other, or why it is not known; none where all is well."""
        if not self.finite:
            return [f"row {self.pack}: losses are not finite, so nothing can be compared"]
        found = []
        if self.moved is not None and self.others > bounds.of_others(self.repeatable):
            found.append(
                f"row {self.pack}: losses of {self._name(self.moved)} moved by {self.others:.2e} when "
                f"{self._name(self.replaced)} was replaced, so it sees that one"
            )
        if self.itself < bounds.of_itself(self.repeatable):
            found.append(
                f"row {self.pack}: losses of {self._name(self.replaced)} moved by only {self.itself:.2e} when it was "
                "replaced, so others that do not move show nothing"
            )
        if self.unpacked > bounds.unpacked:
            found.append(
                f"row {self.pack}: losses in the row and unpacked differ by {self.unpacked:.2e}, so labels, mask, "
                "positions or attention are others there"
            )
        if self.misplaced:
            found.append(f"row {self.pack}: positions of {self._name(self.misplaced[0])} do not count from 0")
        return found

    def _name(self, index: int) -> str:
        return f"sample {index + 1} ({self.tasks[index]})"


def comparable_rows(split: PackedSplit, seed: int) -> Iterator[tuple[int, SampleSlices, int]]:
    """Rows of a split, in an order that depends on the seed, in which a sample can be seen by a later one.

    Yields:
        the index of the row, its slices, and which of them is to be replaced: one with a supervised target before
        another one with some.
    """
    dataset = split.dataset
    for pack in map(int, named_permutation(f"verify/{split.name}/{seed}", split.num_packs)):
        row = split.slices_of(pack)
        if len(row.samples) < 2:
            continue
        with_targets = [
            index for index, mask in enumerate(_of_slices(dataset.mask.items, dataset, row)) if mask[1:].any()
        ]
        if len(with_targets) > 1:
            choice = named_permutation(f"verify/{split.name}/{seed}/{pack}", len(with_targets) - 1)[0]
            yield pack, row, with_targets[choice]


def compare_row(
    losses: Losses, dataset: PackedDataset, pack: int, row: SampleSlices, index: int, seed: int, mean: bool
) -> RowReport:
    """Compute the losses of a row as it is, with one slice replaced, and of each slice alone.

    Args:
        losses: of the model.
        dataset: packed, neither joined nor padded.
        pack: index of the row.
        row: its slices.
        index: the slice to replace.
        seed: of the replacement.
        mean: as in :class:`Bounds`.
    """
    batch = build_batch(dataset, [row])
    before_S, again_S = losses(batch)[0], losses(batch)[0]
    after_S = losses(build_batch(replace_slice(dataset, row, index, seed), [row]))[0]
    change_S = _difference(before_S, after_S)
    ends = np.cumsum(row.lengths)
    places = [slice(end - length, end) for end, length in zip(ends, row.lengths, strict=True)]
    moved = np.array([change_S[place].max() for place in places])
    worst = int(np.argmax(np.where(np.arange(len(moved)) == index, -1, moved)))
    alone_S = np.zeros_like(before_S)
    for place, one in zip(places, _alone(dataset, row), strict=True):
        alone_S[place] = losses(one)[0]
    unpacked_S = _difference(before_S, alone_S)
    targets = max(int(np.count_nonzero(batch.loss_mask_BS)), 1)
    positions_S = batch.position_ids_BS[0]
    lengths = row.lengths.tolist()
    return RowReport(
        pack=pack,
        tasks=tuple(dataset.tasks[task] for task in dataset.task_ids[row.samples]),
        samples=tuple(row.samples.tolist()),
        replaced=index,
        moved=worst if moved[worst] > 0 else None,
        others=float(moved[worst]),
        itself=float(moved[index]),
        unpacked=float(unpacked_S.sum() / targets if mean else unpacked_S.max()),
        misplaced=tuple(
            number
            for number, (place, length) in enumerate(zip(places, lengths, strict=True))
            if not np.array_equal(positions_S[place], np.arange(length))
        ),
        finite=bool(np.isfinite([before_S, after_S, alone_S]).all()),
        repeatable=np.array_equal(before_S, again_S),
    )


def _difference(one_S: np.ndarray, other_S: np.ndarray) -> np.ndarray:
    """Absolute difference of token losses, fp64 [S]; above a loss of 1 relative to it."""
    one, other = one_S.astype(np.float64), other_S.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.abs(one - other) / np.maximum(np.maximum(np.abs(one), np.abs(other)), 1)


def _of_slices(items: np.ndarray, dataset: PackedDataset, row: SampleSlices) -> Sequence[np.ndarray]:
    return [items[start:end] for start, end in zip(*item_ranges(dataset, row), strict=True)]


def _alone(dataset: PackedDataset, row: SampleSlices) -> Iterator[Batch[np.ndarray]]:
    """Yield each slice as a row of its own without padding, built from its stored tokens and mask."""
    tokens, masks = (_of_slices(files.items, dataset, row) for files in (dataset.tokens, dataset.mask))
    for ids, mask in zip(tokens, masks, strict=True):
        length = len(ids)
        labels, supervised = np.zeros((1, length), np.int64), np.zeros((1, length), np.uint8)
        labels[0, :-1], supervised[0, :-1] = ids[1:], mask[1:]
        yield Batch(
            tokens_BS=ids.astype(np.int64)[None],
            labels_BS=labels,
            loss_mask_BS=supervised,
            position_ids_BS=np.arange(length)[None],
            sample_ids_BS=np.zeros((1, length), np.int64),
            task_ids_BS=np.zeros((1, length), np.int64),
            cu_seqlens=np.array([0, length], np.int32),
            max_seqlen=length,
        )

"""The samples of a bad step with the largest losses, by name: one forward pass over its batch, after the fact."""

import dataclasses
import math
from typing import TypedDict

from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedSplit
from mft_megatron.mcore.output_layer.slice_losses import SliceLoss
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import Trainer

# so many are named
NAMED = 8


class NamedSample(TypedDict):
    """A sample slice of a bad step; ``loss`` is ``nan`` or ``inf`` in words where it is not finite."""

    task: str
    sample: int
    pack: int
    first_token: int
    tokens: int
    loss: float | str


@dataclasses.dataclass(frozen=True)
class BatchLosses:
    """Losses of a batch's sample slices.

    Attributes:
        worst: those with the largest losses, the largest first.
        slices: number of slices that supervise a token.
        not_finite: number of those whose loss is not finite.
    """

    worst: tuple[NamedSample, ...]
    slices: int
    not_finite: int

    @property
    def blames_samples(self) -> bool:
        """Whether some slices have finite losses and others do not, so that the data are to blame, not the weights."""
        return 0 < self.not_finite < self.slices


def losses_of_batch(trainer: Trainer, split: PackedSplit, plan: StepPlan) -> BatchLosses:
    """Compute the losses of a batch without dropout, and name the largest; the same on every rank; a collective."""
    found = trainer.slice_losses(split, plan)
    not_finite = sum(not math.isfinite(item.loss) for item in found)
    of_ranks = process_groups.of_all_ranks((len(found), not_finite, sorted(found, key=_rank)[:NAMED]))
    worst = sorted((item for _, _, items in of_ranks for item in items), key=_rank)[:NAMED]
    named = tuple(_named(split, plan, item) for item in worst)
    return BatchLosses(named, sum(count for count, _, _ in of_ranks), sum(bad for _, bad, _ in of_ranks))


def _rank(item: SliceLoss) -> tuple[bool, float, int, int]:
    """Sort key: losses that are not finite first, then the largest."""
    finite = math.isfinite(item.loss)
    return finite, -item.loss if finite else 0.0, item.sample, item.first_token


def _named(split: PackedSplit, plan: StepPlan, item: SliceLoss) -> NamedSample:
    packs = (int(pack) for pack in plan.packs_G if pack >= 0)
    return {
        "task": split.dataset.tasks[int(split.dataset.task_ids[item.sample])],
        "sample": item.sample,
        "pack": next(pack for pack in packs if _holds(split, pack, item)),
        "first_token": item.first_token,
        "tokens": item.tokens,
        "loss": item.loss if math.isfinite(item.loss) else f"{item.loss:g}",
    }


def _holds(split: PackedSplit, pack: int, item: SliceLoss) -> bool:
    slices = split.slices_of(pack)
    return bool(((slices.samples == item.sample) & (slices.starts == item.first_token)).any())

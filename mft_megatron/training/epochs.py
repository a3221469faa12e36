"""At the end of each epoch: was every slice of the training split used exactly as often as planned?

::

    micro-batches of each rank ─► trainer.usage ─sum over data-parallel ranks─► against the index ─► "epoch" event

Counting costs nothing worth naming in a step; the sum is made at an epoch's end and for a checkpoint alone.
"""

import functools
from typing import Any

import numpy as np

from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.usage import Usage, planned_usage
from mft_megatron.errors import InputError
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import Trainer

from .events import event_record
from .progress import Progress
from .run_log import RunLog


class EpochProof:
    """Compares what was used in each epoch with what was planned, over all ranks and all resumes of a run."""

    def __init__(self, arguments: Arguments, dataset: PackedDataset):
        self._split = dataset.split("train")
        self._tasks = dataset.tasks
        self._seed = arguments.initialization.seed
        self._began = 0  # packs of the stream that had been consumed when counting began
        self._before = 0, Usage.none(len(self._tasks))  # an epoch, and its use before the checkpoint by all ranks

    @functools.cached_property
    def _planned(self) -> Usage:
        return planned_usage(self._split)

    def load(self, state: dict[str, Any], log: RunLog, progress: Progress) -> None:
        """Go on from a checkpoint's state; where it has none that fits, counting begins here, and the log says so."""
        usage = state.get("usage")
        if usage is not None and usage["seed"] == self._seed:
            self._began = usage["began"]
            slices_K = np.array(usage["pieces"], np.int64)
            digest_K = np.array([int(digest, 16) for digest in usage["digest"]], np.uint64)
            self._before = usage["epoch"], Usage(slices_K, digest_K)
            return
        self._began = progress.consumed_samples
        if self._began % self._split.num_packs:
            why = "the checkpoint has no counts" if usage is None else f"--seed was {usage['seed']} until here"
            reason = f"use of the data is counted from here on, {why}; epoch {self._epoch(self._began)} is not judged"
            log.write(event_record(progress, "warning", reason=reason))

    def state(self, trainer: Trainer, progress: Progress) -> dict[str, Any]:
        """For a checkpoint: what the epoch that is going on has used, over all ranks; to be called by all."""
        epoch = self._epoch(progress.consumed_samples)
        used = self._used(trainer, epoch)
        return {
            "seed": self._seed,
            "began": self._began,
            "epoch": epoch,
            "pieces": used.slices_K.tolist(),
            "digest": _hexadecimal(used),
        }

    def after_step(self, trainer: Trainer, log: RunLog, before: Progress, progress: Progress) -> None:
        """Judge the epochs that this step has brought to their end.

        Raises:
            InputError: one of them did not use the data as planned; on every rank.
        """
        for epoch in range(self._epoch(before.consumed_samples), self._epoch(progress.consumed_samples)):
            used = self._used(trainer, epoch)
            trainer.usage.forget(epoch)
            complete = epoch * self._split.num_packs >= self._began
            if complete:
                self._refuse_difference(epoch, used, progress)
            tasks = {
                name: {"samples": slices, "digest": digest}
                for name, slices, digest in zip(self._tasks, used.slices_K.tolist(), _hexadecimal(used), strict=True)
            }
            log.write(event_record(progress, "epoch", epoch=epoch, tasks=tasks, complete=complete))

    def _used(self, trainer: Trainer, epoch: int) -> Usage:
        """Of all data-parallel ranks, and before the checkpoint."""
        own = trainer.usage.of(epoch)
        # halves of digests, so that no sum overflows
        parts = np.stack([own.slices_K, own.digest_K & 0xFFFFFFFF, own.digest_K >> 32]).astype(np.int64)
        slices_K, low_K, high_K = process_groups.sum_over_data(parts)
        digest_K = (high_K.astype(np.uint64) << np.uint64(32)) + low_K.astype(np.uint64)
        used = Usage(slices_K, digest_K)
        counted, before = self._before
        return used + before if epoch == counted else used

    def _refuse_difference(self, epoch: int, used: Usage, progress: Progress) -> None:
        planned = self._planned
        differs_K = used.differs_from(planned)
        # another tensor-parallel rank or pipeline stage may see what this one does not
        if not process_groups.any_rank(bool(differs_K.any())):
            return
        tasks = [
            f"{self._tasks[k]} used {used.slices_K[k]} slices of {planned.slices_K[k]}"
            + (", others than planned" if used.slices_K[k] == planned.slices_K[k] else "")
            for k in np.flatnonzero(differs_K)
        ] or ["seen by other ranks of the model"]
        raise InputError(
            f"step {progress.step}: epoch {epoch} did not use the data as planned: {'; '.join(tasks)}; check the data "
            f"set with tools/inspect_data.py --check {self._split.dataset.prefix}; if it is whole, report this, and "
            "continue from an earlier checkpoint with --finetune"
        )

    def _epoch(self, consumed_samples: int) -> int:
        return consumed_samples // self._split.num_packs


def _hexadecimal(usage: Usage) -> list[str]:
    return [f"{digest:016x}" for digest in usage.digest_K.tolist()]

"""Proof of each epoch: every slice of the training split was used exactly as often as planned, or left out by name.

::

    micro-batches of each rank ─► trainer.usage ─────┐
    bad steps of each rank     ─► trainer.left_out ──┴─► sums over data-parallel ranks ─► against the index ─► "epoch"

    used = planned - left out, by task

Counting costs next to nothing in a step; the sum is made at an epoch's end and for a checkpoint only.
"""

import functools
from typing import TypedDict

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


class LeftOutState(TypedDict, total=False):
    """Use that bad steps left out of the same epoch; absent in older checkpoints."""

    left_out_pieces: list[int]
    left_out_digest: list[str]


class UsageState(LeftOutState):
    """Use of the data in a checkpoint, by all ranks: ``pieces`` and ``digest`` (hexadecimal) of each task in ``epoch``.

    ``began``: packs of the stream that had been consumed when counting began. ``seed``: of the order of the packs.
    """

    seed: int
    began: int
    epoch: int
    pieces: list[int]
    digest: list[str]


class EpochState(TypedDict, total=False):
    """The part of a checkpoint's state that an epoch's proof reads; older checkpoints have none."""

    usage: UsageState


class EpochProof:
    """Comparison of the slices used in each epoch with those planned, over all ranks and all resumes of a run."""

    def __init__(self, arguments: Arguments, dataset: PackedDataset):
        self._split = dataset.split("train")
        self._tasks = dataset.tasks
        self._seed = arguments.initialization.seed
        # packs of the stream that had been consumed when counting began
        self._began = 0
        # the epoch in which the run was resumed, and its use before that by all ranks
        self._resumed_epoch, self._used_before = 0, Usage.none(len(self._tasks))
        self._left_out_before = self._used_before

    @functools.cached_property
    def _planned(self) -> Usage:
        return planned_usage(self._split)

    def load(self, state: EpochState, log: RunLog, progress: Progress) -> None:
        """Continue from a checkpoint's state; if it has none that fits, counting begins here, and the log says so."""
        usage = state.get("usage")
        if usage is not None and usage["seed"] == self._seed:
            self._began = usage["began"]
            self._resumed_epoch, self._used_before = usage["epoch"], _usage(usage["pieces"], usage["digest"])
            if "left_out_pieces" in usage:
                self._left_out_before = _usage(usage["left_out_pieces"], usage["left_out_digest"])
            return
        self._began = progress.consumed_samples
        if self._began % self._split.num_packs:
            why = "the checkpoint has no counts" if usage is None else f"--seed was {usage['seed']} so far"
            reason = f"use of the data is counted from here on, {why}; epoch {self._epoch(self._began)} is not judged"
            log.write(event_record(progress, "warning", reason=reason))

    def state(self, trainer: Trainer, progress: Progress) -> UsageState:
        """The state for a checkpoint: the use of the current epoch by all ranks. A collective."""
        epoch = self._epoch(progress.consumed_samples)
        used, left_out = self._so_far(trainer, epoch)
        return {
            "seed": self._seed,
            "began": self._began,
            "epoch": epoch,
            "pieces": used.slices_K.tolist(),
            "digest": _hexadecimal(used),
            "left_out_pieces": left_out.slices_K.tolist(),
            "left_out_digest": _hexadecimal(left_out),
        }

    def after_step(self, trainer: Trainer, log: RunLog, before: Progress, progress: Progress) -> None:
        """Judge the epochs that end with a step.

        Args:
            trainer: counts the use of this rank.
            log: takes an event for each epoch.
            before: progress before the step.
            progress: progress after it.

        Raises:
            InputError: one of them did not use the data as planned, or a file of the data set is no longer the one that
                was opened; on every rank.
        """
        for epoch in range(self._epoch(before.consumed_samples), self._epoch(progress.consumed_samples)):
            self._refuse_changed_files(progress)
            used, left_out = self._so_far(trainer, epoch)
            trainer.usage.forget(epoch)
            trainer.left_out.forget(epoch)
            complete = epoch * self._split.num_packs >= self._began
            if complete:
                self._refuse_difference(epoch, used + left_out, progress)
            columns = zip(
                self._tasks, used.slices_K.tolist(), _hexadecimal(used), left_out.slices_K.tolist(), strict=True
            )
            tasks = {
                name: {"samples": slices, "digest": digest, **({"left_out": missing} if missing else {})}
                for name, slices, digest, missing in columns
            }
            log.write(event_record(progress, "epoch", epoch=epoch, tasks=tasks, complete=complete))

    def _so_far(self, trainer: Trainer, epoch: int) -> tuple[Usage, Usage]:
        """Sum what was used and what was left out of an epoch, by all data-parallel ranks and before the checkpoint."""
        # halves of digests, so that no sum overflows
        parts = [
            part
            for usage in (trainer.usage.of(epoch), trainer.left_out.of(epoch))
            for part in (usage.slices_K, usage.digest_K & 0xFFFFFFFF, usage.digest_K >> 32)
        ]
        sums = process_groups.sum_over_data(np.stack(parts).astype(np.int64))
        used, left_out = (
            Usage(slices_K, (high_K.astype(np.uint64) << np.uint64(32)) + low_K.astype(np.uint64))
            for slices_K, low_K, high_K in (sums[:3], sums[3:])
        )
        if epoch != self._resumed_epoch:
            return used, left_out
        return used + self._used_before, left_out + self._left_out_before

    def _refuse_changed_files(self, progress: Progress) -> None:
        """Check the data set's files, each rank what it sees of them; a collective of all ranks."""
        refusal = None
        try:
            self._split.dataset.files.refuse_change()
        except InputError as error:
            refusal = f"step {progress.step}: {error}"
        process_groups.raise_on_all_ranks(refusal)

    def _refuse_difference(self, epoch: int, used: Usage, progress: Progress) -> None:
        planned = self._planned
        differs_K = used.differs_from(planned)
        # another tensor-parallel rank or pipeline stage may see a difference that this one does not
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


def _usage(slices: list[int], digests: list[str]) -> Usage:
    """The usage of each task that a checkpoint holds."""
    return Usage(np.array(slices, np.int64), np.array([int(digest, 16) for digest in digests], np.uint64))


def _hexadecimal(usage: Usage) -> list[str]:
    return [f"{digest:016x}" for digest in usage.digest_K.tolist()]

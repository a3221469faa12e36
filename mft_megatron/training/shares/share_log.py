"""Keep the account of a run's shares, log what is worth a warning, and carry both through checkpoints."""

from typing import TypedDict

import numpy as np

from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.epoch_order import epoch_order
from mft_megatron.losses.table import LOSSES
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import StepReport
from mft_megatron.training.events import event_record
from mft_megatron.training.progress import Progress
from mft_megatron.training.run_log import RunLog

from .account import AccountState, RunShares, ShareAccount
from .coming_epoch import count_epoch
from .deviations import Circumstances, EpochPacks, off_target, share_warning
from .start_lines import clipping_warning, expectation_lines

# shares are judged after so many steps, at every doubling of them, and at ends of epochs and of the run
FIRST_JUDGED = 100


class ShareState(TypedDict):
    """Shares in a checkpoint: the account, the names of tasks that a warning was about, and when to judge next."""

    account: AccountState
    warned: list[str]
    judged_next: int


class RunShareState(TypedDict, total=False):
    """The part of a checkpoint's state that the shares read; older checkpoints have none."""

    shares: ShareState


class ShareLog:
    """The realised shares of a run, and the warnings about them; each is about tasks that none before it named."""

    def __init__(self, arguments: Arguments, dataset: PackedDataset):
        self._arguments, self._dataset = arguments, dataset
        self._split = dataset.split("train")
        self._account = self._new_account(began=0)
        self._warned: set[str] = set()
        self._judged_next = FIRST_JUDGED

    def load(self, state: RunShareState, log: RunLog, progress: Progress) -> None:
        """Continue from a checkpoint's state; if it has none that fits, counting begins here, and the log says so."""
        why: str | None = "the checkpoint has none"
        if "shares" in state:
            why = self._account.load(state["shares"]["account"])
        if why is None:
            self._warned = set(state["shares"]["warned"])
            self._judged_next = state["shares"]["judged_next"]
        elif progress.step:
            self._account = self._new_account(began=progress.consumed_samples)
            reason = f"realised shares of the objective are counted from here on, {why}"
            log.write(event_record(progress, "warning", reason=reason))

    def expect(self, log: RunLog, progress: Progress, weight_K: np.ndarray, order_version: int) -> None:
        """Print what the coming epoch holds for each task, and warn of rare tasks in clipped steps; on the main rank.

        Args:
            log: of the run.
            progress: before the first step.
            weight_K: fp64 [K], weights of the first step.
            order_version: of the order of packs that the run follows.
        """
        if not process_groups.is_main():
            return
        a, split, names = self._arguments, self._split, self._dataset.tasks
        loss = LOSSES[a.multi_task.mft_loss]
        order = epoch_order(split, a.initialization.seed, progress.consumed_samples // split.num_packs, order_version)
        epoch = count_epoch(split, order, a.batch_sizes.sizes[-1], weight_K, loss.sample_means)
        known_K = np.where(epoch.presence_K > 0, weight_K, 0.0)
        target_K = known_K / (known_K.sum() or 1.0)  # sampling may leave a split without a task that has a weight
        for line in expectation_lines(epoch, names, target_K if loss.weighted else None):
            log.print(line)
        # tokens of losses without weights count the same, however few steps have them
        if loss.weighted and a.multi_task.mft_normalization == "epoch":
            warning = clipping_warning(epoch, weight_K, a.regularization.clip_grad)
            if warning is not None:
                reason, rare = warning
                log.write(event_record(progress, "warning", reason=reason, tasks=[names[task] for task in rare]))

    def state(self) -> ShareState:
        """The state for a checkpoint."""
        return {
            "account": self._account.state(),
            "warned": [name for name in self._dataset.tasks if name in self._warned],
            "judged_next": self._judged_next,
        }

    def count(self, plan: StepPlan, report: StepReport | None) -> None:
        """Count a step that has just ended, unless it updated nothing."""
        if report is not None and report.updated:
            self._account.count(plan, report)

    def read(self) -> RunShares:
        """The account so far; waits for the device."""
        return self._account.read()

    def judge(self, log: RunLog, before: Progress, progress: Progress, over: bool) -> None:
        """Write a warning where shares are off their targets, if this is a time to judge them.

        Args:
            log: takes the warning.
            before: progress before the last step.
            progress: progress after it.
            over: whether the run is over, so that no later step can change the shares.
        """
        length = self._split.num_packs
        epoch_ends = progress.consumed_samples // length > before.consumed_samples // length
        logged = progress.step % self._arguments.logging.log_interval == 0
        enough = logged and self._account.steps >= self._judged_next
        if not (over or epoch_ends or enough) or not LOSSES[self._arguments.multi_task.mft_loss].weighted:
            return
        shares = self.read()
        while self._judged_next <= shares.steps:
            self._judged_next *= 2
        epochs = EpochPacks.between(shares.began, progress.consumed_samples, length)
        by_epoch = self._arguments.multi_task.mft_normalization == "epoch"
        off = off_target(shares, epochs if by_epoch and not over else None)
        names = [self._dataset.tasks[task] for task in off]
        if set(names) <= self._warned:
            return
        self._warned |= set(names)
        reason = share_warning(shares, off, self._dataset.tasks, self._circumstances(epochs, progress, over))
        log.write(event_record(progress, "warning", reason=reason, tasks=names))

    def _circumstances(self, epochs: EpochPacks, progress: Progress, over: bool) -> Circumstances:
        a, entry = self._arguments, self._dataset.entry
        packed = not (entry.joined or entry.padded)
        return Circumstances(
            a.multi_task.mft_normalization,
            max(a.batch_sizes.sizes),
            epochs,
            progress.skipped_steps,
            packed and entry.packer == "decreasing",
            over,
        )

    def _new_account(self, began: int) -> ShareAccount:
        options = self._arguments.multi_task
        return ShareAccount(self._split, options.mft_loss, options.mft_normalization, began)

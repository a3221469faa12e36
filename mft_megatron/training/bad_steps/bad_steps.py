"""Steps that the judge refused: name their samples, and stop or leave the batch out, as ``--on-bad-step`` says.

::

    numbers of a step ─► judge, before the update ─► bad ─► forward pass over the batch ─► event "bad step"
                                                            ├─► stop: the run ends with code DIVERGED
                                                            ├─► skip: counted as left out, training goes on
                                                            └─► rollback: RollbackRequest, and left out from then on
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.mcore.trainer import StepReport, Trainer
from mft_megatron.run_folder.description import CheckpointRef
from mft_megatron.training.events import event_record, samples_text, suspects
from mft_megatron.training.progress import Progress
from mft_megatron.training.run_log import RunLog
from mft_megatron.training.saving.data_order import order_version

from .good_checkpoint import diverged, good_checkpoint
from .left_out import LeftOut
from .samples import BatchLosses, losses_of_batch
from .step_judge import JudgeState, StepJudge


class BadStepContent(TypedDict):
    """Bad steps in a checkpoint: how many came last in a row, the step of the last update, and the judge.

    ``left_out``: fields of :class:`.left_out.LeftOutBatch`.
    """

    in_a_row: int
    last_update: int
    judge: JudgeState
    left_out: list[dict[str, int | str]]


class BadStepState(TypedDict, total=False):
    """The part of a checkpoint's state that bad steps read; older checkpoints have none."""

    bad_steps: BadStepContent


@dataclasses.dataclass
class RollbackRequest(Exception):  # noqa: N818  (a request, not an error)
    """Raised on every rank when the run is to go back to a checkpoint.

    Attributes:
        target: the checkpoint.
        step: the bad step.
    """

    target: CheckpointRef
    step: int


class BadSteps:
    """The judge of a run's steps, and what becomes of those that it refuses.

    Attributes:
        judge: to be asked before the update of each step.
        left_out: packs that are left out of the plans of steps.
    """

    def __init__(self, arguments: Arguments, dataset: PackedDataset, of_this_run: Callable[[int], bool]):
        """
        Args:
            arguments: of the run.
            dataset: that it trains on.
            of_this_run: whether the checkpoint of so many steps in ``--save`` is of this run's own past.
        """
        self._of_this_run = of_this_run
        self._arguments, self._split = arguments, dataset.split("train")
        self._options = arguments.bad_steps
        self.judge = StepJudge(self._options, dataset.tasks)
        folder, seed = arguments.checkpoint.save, arguments.initialization.seed
        stream = f"data set {dataset.dataset_hash}, seed {seed}, order {order_version(arguments, dataset)}"
        self.left_out = LeftOut(None if folder is None else Path(folder), stream)
        self._in_a_row, self._last_update = 0, 0
        self._doubted = False

    def load(self, state: BadStepState, log: RunLog, progress: Progress) -> None:
        """Continue from a checkpoint's state and the run folder, as far as they have one; a collective."""
        content = state.get("bad_steps")
        self._last_update = progress.step
        if content is not None:
            self._in_a_row, self._last_update = content["in_a_row"], content["last_update"]
            self.judge.load(content["judge"])
        self.left_out.load([] if content is None else content["left_out"])
        ahead = [batch for batch in self.left_out.batches if batch.first + batch.packs > progress.consumed_samples]
        if ahead:
            steps = ", ".join(str(batch.step) for batch in ahead)
            log.print(f"packs of bad steps are left out when they come again: those of step {steps}")

    def state(self) -> BadStepState:
        """The state for a checkpoint."""
        judge = self.judge.state()
        left_out = self.left_out.state()
        content: BadStepContent = {
            "in_a_row": self._in_a_row,
            "last_update": self._last_update,
            "judge": judge,
            "left_out": left_out,
        }
        return {"bad_steps": content}

    @property
    def proven(self) -> int:
        """Steps of the newest weights that have had a finite loss in a step."""
        return self._last_update - 1

    @property
    def doubted(self) -> bool:
        """Whether the last step was bad, and the weights are to blame: a checkpoint of them is none to go on from."""
        return self._doubted

    def after_step(
        self,
        trainer: Trainer,
        log: RunLog,
        before: Progress,
        progress: Progress,
        plan: StepPlan,
        report: StepReport | None,
    ) -> None:
        """Count a good step; of a bad one name the samples, and end the run, go back or go on. A collective then.

        Args:
            trainer: of the run.
            log: takes the event.
            before: progress before the step.
            progress: after the step.
            plan: of the step, without packs that were left out before.
            report: of the step.

        Raises:
            InputError: the run ends, with the code DIVERGED.
            RollbackRequest: it is to go back.
        """
        if report is None or report.overflow:
            return
        if report.refused is None:
            self._in_a_row, self._last_update, self._doubted = 0, progress.step, False
            self.judge.accept()
            return
        self._in_a_row += 1
        losses = losses_of_batch(trainer, self._split, plan)
        innocent = self.judge.jumped or losses.blames_samples
        self._doubted = not innocent
        most = before.step if innocent else self.proven
        target, ends = self._decide(most, innocent, log)
        action = "its global batch is left out" if target is None else f"the run goes back to {target.path}"
        slices = {"all": losses.slices, "not_finite": losses.not_finite}
        details = {"packs": plan.num_packs, "samples": list(losses.worst), "slices": slices}
        action = action if ends is None else "the run ends"
        log.write(event_record(progress, "bad step", reason=report.refused, action=action, **details))
        if ends is not None:
            what = f"step {progress.step}: {report.refused}{ends}; it updated nothing. "
            if innocent:
                leave_out = " --on-bad-step skip" if self._options.on_bad_step == "stop" else ""
                raise diverged(self._arguments, what + self._suspicion(losses), most, leave_out)
            all_or_none = "No" if losses.not_finite else "Every"
            what += (
                f"{all_or_none} sample of the batch has a finite loss, so the weights are to blame: training has "
                "diverged. Lower --lr or --clip-grad or lengthen the warm-up"
            )
            raise diverged(self._arguments, what, most)
        if target is not None:
            packs = progress.consumed_samples - before.consumed_samples
            step = target.info.iteration
            self.left_out.add(progress.step, before.consumed_samples, packs, step, report.refused)
            raise RollbackRequest(target, progress.step)

    def _decide(self, most: int, innocent: bool, log: RunLog) -> tuple[CheckpointRef | None, str | None]:
        """Decide what becomes of a bad step; a collective.

        Args:
            most: steps of the newest checkpoint that is good.
            innocent: whether the weights are good, so that leaving the batch out is enough.
            log: takes lines about checkpoints.

        Returns:
            the checkpoint to go back to, if any; and why the run ends, in words that follow the reason of the bad step,
            ``None`` if it goes on.
        """
        options = self._options
        if options.on_bad_step == "stop":
            return None, ""
        if options.on_bad_step == "rollback":
            target = good_checkpoint(self._arguments, most, self._of_this_run, log.print)
            if target is not None:
                # checkpoints from here on have the weights of the last update that the target has
                since = min(self._last_update, target.info.iteration)
                times = 1 + sum(batch.checkpoint >= since for batch in self.left_out.batches)
                if times > options.max_bad_steps:
                    limit = f"(--max-bad-steps {options.max_bad_steps})"
                    return None, f", rollback {times} since a checkpoint with a new update {limit}"
                return target, None
            if not innocent:
                return None, ", and there is no checkpoint to go back to"
        if self._in_a_row <= options.max_bad_steps:
            return None, None
        return None, f", bad step {self._in_a_row} in a row (--max-bad-steps {options.max_bad_steps})"

    def _suspicion(self, losses: BatchLosses) -> str:
        """The samples that made a step bad and what to do, in sentences without the last full stop."""
        named = samples_text(losses.worst, {"all": losses.slices, "not_finite": losses.not_finite})
        packs = ",".join(str(pack) for pack in dict.fromkeys(sample["pack"] for sample in suspects(losses.worst)))
        look = f"tools/inspect_data.py {self._split.dataset.prefix} --packs {packs} shows them"
        stops = self._options.on_bad_step == "stop"
        remedy = "leave the batch out (--on-bad-step skip)" if stops else "raise --max-bad-steps"
        return f"{named[0].upper()}{named[1:]}; {look}. If they are bad, {remedy}; else lower --lr"

"""Steps that the judge refused: name their samples, and stop or leave the batch out, as ``--on-bad-step`` says.

::

    numbers of a step ─► judge, before the update ─► bad ─► forward pass over the batch ─► event "bad step"
                                                            ├─► stop: the run ends with code DIVERGED
                                                            └─► skip: counted as left out, training goes on
"""

from typing import TypedDict

from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.mcore.trainer import StepReport, Trainer
from mft_megatron.training.events import event_record, samples_text, suspects
from mft_megatron.training.progress import Progress
from mft_megatron.training.run_log import RunLog

from .good_checkpoint import diverged
from .samples import BatchLosses, losses_of_batch
from .step_judge import JudgeState, StepJudge


class BadStepContent(TypedDict):
    """Bad steps in a checkpoint: how many came last in a row, the step of the last update, and the judge."""

    in_a_row: int
    last_update: int
    judge: JudgeState


class BadStepState(TypedDict, total=False):
    """The part of a checkpoint's state that bad steps read; older checkpoints have none."""

    bad_steps: BadStepContent


class BadSteps:
    """The judge of a run's steps, and what becomes of those that it refuses.

    Attributes:
        judge: to be asked before the update of each step.
    """

    def __init__(self, arguments: Arguments, dataset: PackedDataset):
        """
        Args:
            arguments: of the run.
            dataset: that it trains on.
        """
        self._arguments, self._split = arguments, dataset.split("train")
        self._options = arguments.bad_steps
        self.judge = StepJudge(self._options, dataset.tasks)
        self._in_a_row, self._last_update = 0, 0

    def load(self, state: BadStepState, progress: Progress) -> None:
        """Continue from a checkpoint's state, as far as it has one."""
        self._last_update = progress.step
        if "bad_steps" in state:
            self._in_a_row, self._last_update = state["bad_steps"]["in_a_row"], state["bad_steps"]["last_update"]
            self.judge.load(state["bad_steps"]["judge"])

    def state(self) -> BadStepState:
        """The state for a checkpoint."""
        judge = self.judge.state()
        return {"bad_steps": {"in_a_row": self._in_a_row, "last_update": self._last_update, "judge": judge}}

    @property
    def proven(self) -> int:
        """Steps of the newest weights that have had a finite loss in a step."""
        return self._last_update - 1

    def after_step(
        self, trainer: Trainer, log: RunLog, progress: Progress, plan: StepPlan, report: StepReport | None
    ) -> None:
        """Count a good step; name the samples of a bad one, and end the run or let it go on. A collective then.

        Args:
            trainer: of the run.
            log: takes the event.
            progress: after the step.
            plan: of the step.
            report: of the step.

        Raises:
            InputError: the run ends, with the code DIVERGED.
        """
        if report is None or report.overflow:
            return
        if report.refused is None:
            self._in_a_row, self._last_update = 0, progress.step
            self.judge.accept()
            return
        self._in_a_row += 1
        losses = losses_of_batch(trainer, self._split, plan)
        ends = self._ends()
        slices = {"all": losses.slices, "not_finite": losses.not_finite}
        details = {"packs": plan.num_packs, "samples": list(losses.worst), "slices": slices}
        action = "the run ends" if ends is not None else "its global batch is left out"
        log.write(event_record(progress, "bad step", reason=report.refused, action=action, **details))
        if ends is not None:
            what = f"step {progress.step}: {report.refused}{ends}; it updated nothing. "
            if self.judge.jumped or losses.blames_samples:
                leave_out = " --on-bad-step skip" if self._options.on_bad_step == "stop" else ""
                raise diverged(self._arguments, what + self._suspicion(losses), progress.step - 1, leave_out)
            all_or_none = "No" if losses.not_finite else "Every"
            what += (
                f"{all_or_none} sample of the batch has a finite loss, so the weights are to blame: training has "
                "diverged. Lower --lr or --clip-grad or lengthen the warm-up"
            )
            raise diverged(self._arguments, what, self.proven)

    def _ends(self) -> str | None:
        """Why a bad step ends the run, in words that follow its reason; ``None`` if it does not."""
        if self._options.on_bad_step == "stop":
            return ""
        if self._in_a_row <= self._options.max_bad_steps:
            return None
        return f", bad step {self._in_a_row} in a row (--max-bad-steps {self._options.max_bad_steps})"

    def _suspicion(self, losses: BatchLosses) -> str:
        """The samples that made a step bad and what to do, in sentences without the last full stop."""
        named = samples_text(losses.worst, {"all": losses.slices, "not_finite": losses.not_finite})
        packs = ",".join(str(pack) for pack in dict.fromkeys(sample["pack"] for sample in suspects(losses.worst)))
        look = f"tools/inspect_data.py {self._split.dataset.prefix} --packs {packs} shows them"
        return f"{named[0].upper()}{named[1:]}; {look}. If they are bad, leave the batch out; else lower --lr"

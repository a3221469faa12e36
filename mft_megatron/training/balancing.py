"""Task weights of a run: those of the options, or those of a balancer, which validation draws feed.

::

    draw d of the validation split ─► losses [K'] of the K' tasks it has ─► balancer ─► weights [K] ─► next step

New weights hold from the next step on. Everything here is the same on every rank: the losses are sums over all ranks,
and the weights are those of the main rank.
"""

import dataclasses
import math
from typing import Any, TypedDict

import numpy as np
import torch

from mft_megatron.arguments.groups.multi_task import MultiTaskArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.validation_sampling import ValidationDraws
from mft_megatron.errors import InputError
from mft_megatron.losses.balancers.balancer import Balancer, State
from mft_megatron.losses.balancers.participation import mean_for_others
from mft_megatron.losses.balancers.table import BALANCERS
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import Trainer

from .bad_steps.good_checkpoint import diverged
from .events import event_record
from .progress import Progress
from .run_log import RunLog
from .task_weights import initial_weights, task_numbers

# the cost of a forward pass, as a part of that of a training step
FORWARD_COST = 1 / 3
# draws that cost more than this part of training are worth an advice; their size is estimated from the first few
EXPENSIVE = 0.2
ESTIMATED_DRAWS = 20


class BalanceState(TypedDict):
    """Task weights in a checkpoint: of which balancer, fp64 [K], its state, and the step before which it started."""

    kind: str
    weight_K: torch.Tensor
    balancer: State | None
    begun: int


class TaskBalance:
    """Task weights that stay as the options set them, but for tasks that are stopped, whose weight is 0.

    Attributes:
        kind: ``--task-balance``.
        weight_K: fp64 [K], weights of the next step and of evaluations before it.
    """

    kind = "static"

    def __init__(self, weight_K: np.ndarray):
        """
        Args:
            weight_K: fp64 [K], weights before the first step.
        """
        self._weight_K = self.weight_K = weight_K
        self._active_K = np.ones(len(weight_K), bool)

    @property
    def needs_first_losses(self) -> bool:
        """Whether :meth:`begin` needs the losses over the whole validation split."""
        return False

    def begin(self, trainer: Trainer, log: RunLog, progress: Progress, first_loss_K: np.ndarray | None = None) -> None:
        """Put the weights of the first step into force.

        Args:
            trainer: computes losses of draws.
            log: takes warnings.
            progress: before the step.
            first_loss_K: fp64 [K], losses over the whole validation split, NaN where it lacks a task; where
                :attr:`needs_first_losses`.
        """
        self._apply()

    def draws_after(self, step: int) -> bool:
        """Whether a validation draw updates the weights after a step, counted from 1."""
        return False

    def after_step(self, trainer: Trainer, log: RunLog, progress: Progress) -> bool:
        """Put the weights of the next step into force; return whether that took a validation draw."""
        self._apply()
        return False

    def stop_tasks(self, active_K: np.ndarray) -> None:
        """Give weight 0 to tasks that are not active, from the next step on; ``active_K`` bool [K]."""
        self._active_K = active_K
        self._apply()

    def state(self) -> BalanceState:
        """The state for a checkpoint."""
        return {"kind": self.kind, "weight_K": torch.from_numpy(self._weight_K), "balancer": None, "begun": 0}

    def load(self, state: BalanceState, log: RunLog, progress: Progress) -> None:
        """Continue from a checkpoint's state; the state of another balancer is not used, and the log says so."""
        if state["kind"] == self.kind:
            self._resume(state)
            return
        reason = f"--task-balance {self.kind} starts from its beginning: the weights so far were {state['kind']}"
        log.write(event_record(progress, "warning", reason=reason))

    def _resume(self, state: BalanceState) -> None:
        """Continue from a state of the same kind; weights of the options hold as they are now."""

    def _apply(self) -> None:
        self.weight_K = np.where(self._active_K, self._weight_K, 0.0)


class DrawnBalance(TaskBalance):
    """Task weights of a balancer: uniform before the first step, then changed by validation draws."""

    def __init__(self, arguments: Arguments, dataset: PackedDataset):
        """
        Raises:
            InputError: no validation data, or options that do not fit the tasks.
        """
        super().__init__(np.full(len(dataset.tasks), 1 / len(dataset.tasks)))
        self.kind = arguments.multi_task.task_balance
        if "valid" not in dataset.splits:
            raise InputError(
                f"--task-balance {self.kind} follows validation losses, and {dataset.prefix} has no validation split; "
                "preprocess it with --split 98,2,0, or use --task-balance static"
            )
        values = balancer_options(self.kind, arguments.multi_task)
        self._draws = ValidationDraws(dataset.split("valid"), arguments.initialization.seed, values["sample_valid_num"])
        self._known_K = self._draws.known_K
        if not self._known_K.any():
            raise InputError(f"--task-balance {self.kind}: no validation sample of {dataset.prefix} supervises a token")
        for name in BALANCERS[self.kind].task_options:
            option = f"--{self.kind}-{name.replace('_', '-')}"
            number_K = task_numbers(option, values[name], dataset.tasks, default=0.0)
            if (number_K < 0).any():
                raise InputError(f"{option}: numbers must be at least 0, not {number_K.tolist()}")
            values[name] = tuple(number_K[self._known_K])
        self._arguments, self._dataset = arguments, dataset
        self._balancer = BALANCERS[self.kind](**values)
        self._state: State | None = None
        self._begun = 0  # the balancer's warm-up counts from this step
        self._left_out: tuple[str, ...] = ()
        self._cost = _cost(self._draws, self.kind, self._balancer, arguments)

    @property
    def needs_first_losses(self) -> bool:
        """Whether the balancer needs the losses over the whole validation split, and has none from a checkpoint."""
        return self._balancer.needs_first_losses and self._state is None

    def begin(self, trainer: Trainer, log: RunLog, progress: Progress, first_loss_K: np.ndarray | None = None) -> None:
        """Start the balancer with draw 0, unless it continues from a checkpoint, and put its weights into force."""
        log.print(self._cost)
        missing = [name for name, known in zip(self._dataset.tasks, self._known_K, strict=True) if not known]
        if missing:
            reason = f"--task-balance {self.kind}: no validation data; these tasks get the mean weight"
            log.write(event_record(progress, "warning", reason=reason, tasks=missing))
        if self._state is None:
            first_loss = None if first_loss_K is None else torch.from_numpy(first_loss_K[self._known_K])
            state, self._begun = self._balancer.begin(int(self._known_K.sum()), first_loss), progress.step
            self._state = self._update(state, trainer, log, progress)
        super().begin(trainer, log, progress)

    def draws_after(self, step: int) -> bool:
        """Whether a validation draw updates the weights after a step, counted from 1."""
        return step % self._balancer.update_interval == 0

    def after_step(self, trainer: Trainer, log: RunLog, progress: Progress) -> bool:
        """Update the weights with a validation draw every few steps; return whether there was one."""
        due = self.draws_after(progress.step)
        if due and self._state is not None:
            self._state = self._update(self._state, trainer, log, progress)
        super().after_step(trainer, log, progress)
        return due

    def state(self) -> BalanceState:
        """The state for a checkpoint, with that of the balancer."""
        return {**super().state(), "balancer": self._state, "begun": self._begun}

    def _resume(self, state: BalanceState) -> None:
        self._state, self._begun, self._weight_K = state["balancer"], state["begun"], state["weight_K"].numpy()

    def _update(self, state: State, trainer: Trainer, log: RunLog, progress: Progress) -> State:
        """Update the weights with the losses of a draw; the balancer's new state."""
        draw = 0 if self._balancer.fixed_draw else progress.step // self._balancer.update_interval
        loss_K = trainer.task_losses(self._dataset, self._draws.rows(draw))
        loss = torch.from_numpy(loss_K[self._known_K])
        if not loss.isfinite().all():
            losses = f"a validation loss is not finite ({loss_K.tolist()})"
            what = f"step {progress.step}: {losses}; training has diverged. Lower --lr"
            raise diverged(self._arguments, what, most=progress.step - 1)
        state, weight, took_part = self._balancer.update(state, loss, progress.step - self._begun)
        if not weight.isfinite().all():
            raise InputError(
                f"step {progress.step}: the weights of --task-balance {self.kind} are {weight.tolist()}; its options "
                "are too large for fp64, use values nearer to their defaults"
            )
        weight_K = mean_for_others(weight, torch.from_numpy(self._known_K))
        self._weight_K = process_groups.broadcast_from_main(weight_K).numpy()
        self._warn_of_left_out(took_part, log, progress)
        return state

    def _warn_of_left_out(self, took_part: torch.Tensor, log: RunLog, progress: Progress) -> None:
        """Log which tasks did not take part, whenever these change; ``took_part`` bool [K']."""
        known = np.flatnonzero(self._known_K)
        left_out = tuple(self._dataset.tasks[task] for task in known[~took_part.numpy()])
        if left_out and left_out != self._left_out:
            reason = "flat validation curve or one point only; these tasks get the mean weight"
            log.write(event_record(progress, "warning", reason=reason, tasks=list(left_out)))
        self._left_out = left_out


def task_balance(arguments: Arguments, dataset: PackedDataset) -> TaskBalance:
    """The task weights of a run, as ``--task-balance`` chooses them.

    Raises:
        InputError: weights that do not fit the tasks, or a balancer without validation data.
    """
    options = arguments.multi_task
    weight_K = initial_weights(options, dataset.tasks, [task.weight for task in dataset.ledger.tasks])
    return TaskBalance(weight_K) if options.task_balance == TaskBalance.kind else DrawnBalance(arguments, dataset)


def balancer_options(kind: str, options: MultiTaskArguments) -> dict[str, Any]:
    """The values of a balancer's fields: of ``update_interval`` that of ``--<kind>-update-interval``, and so on."""
    prefix = kind.replace("-", "_")
    return {field.name: getattr(options, f"{prefix}_{field.name}") for field in dataclasses.fields(BALANCERS[kind])}


def _cost(draws: ValidationDraws, kind: str, balancer: Balancer, arguments: Arguments) -> str:
    """The cost of draws compared to training, estimated before anything is measured, in words."""
    every, batch = balancer.update_interval, arguments.training.global_batch_size
    rows = max(len(draws.rows(draw)) for draw in range(ESTIMATED_DRAWS))
    computed = -(-rows // arguments.batch_multiple) * arguments.batch_multiple
    cost = FORWARD_COST * computed / (every * batch)
    text = (
        f"--task-balance {kind}: draws of up to {rows} packs ({balancer.sample_valid_num} asked for), {computed} with "
        f"the empty ones that fill up the ranks, every {every} step(s) of {batch} packs: about "
        f"{math.ceil(100 * cost)} % of the training's computation"
    )
    if cost <= EXPENSIVE:
        return text
    return (
        f"{text}; --{kind}-update-interval {math.ceil(every * cost / EXPENSIVE)} would bring it below {EXPENSIVE:.0%}"
    )

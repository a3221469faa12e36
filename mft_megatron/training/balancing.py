"""Where task weights come from while a run goes on: the options, or a balancer fed with validation draws.

::

    draw d of the validation split ─► losses [K'] of the K' tasks it has ─► balancer ─► weights [K] ─► next step

New weights hold from the next step on. Everything here is the same on every rank: the losses are sums over all ranks,
and the weights are those of the main rank.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from mft_megatron.arguments.groups.multi_task import MultiTaskArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.validation_sampling import ValidationDraws
from mft_megatron.errors import InputError
from mft_megatron.losses.balancers.participation import mean_for_others
from mft_megatron.losses.balancers.table import BALANCERS
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import Trainer

from .events import event_record
from .progress import Progress
from .run_log import RunLog
from .task_weights import initial_weights, task_numbers

# forward passes are about a third of a training step
FORWARD_SHARE = 1 / 3
# a share of the computation that earns an advice, and the draws whose sizes are looked at to tell
DEAR = 0.2
LOOKED_AT = 20


class TaskBalance:
    """The weights of a run: made before the first step, changed by draws, set to 0 for tasks that are stopped.

    ``weight_K`` fp64 [K]: the weights of the next step and of evaluations before it.
    """

    def __init__(self, arguments: Arguments, dataset: PackedDataset):
        """
        Raises:
            InputError: weights that do not fit the tasks, or a balancer without validation data.
        """
        options = arguments.multi_task
        self._weight_K = initial_weights(options, dataset.tasks, [task.weight for task in dataset.ledger.tasks])
        self.weight_K = self._weight_K
        self._active_K = np.ones(len(dataset.tasks), bool)
        self._dataset = dataset
        self._kind = options.task_balance
        self._balancer = self._state = self._left_out = None
        self._begun = 0  # the step before which the balancer started; its warm-up counts from there
        if self._kind == "static":
            return
        if "valid" not in dataset.splits:
            raise InputError(
                f"--task-balance {self._kind} follows validation losses, and {dataset.prefix} has no validation split; "
                "preprocess it with --split 98,2,0, or use --task-balance static"
            )
        given = _options_of(self._kind, options)
        self._draws = ValidationDraws(dataset.split("valid"), arguments.initialization.seed, given["sample_valid_num"])
        self._known_K = self._draws.known_K
        if not self._known_K.any():
            raise InputError(
                f"--task-balance {self._kind}: no validation sample of {dataset.prefix} supervises a token"
            )
        if self._kind == "famo":
            lowest_K = task_numbers("--famo-min-losses", options.famo_min_losses, dataset.tasks, default=0.0)
            if (lowest_K < 0).any():
                raise InputError(f"--famo-min-losses: no loss is below 0, as in {lowest_K.tolist()}")
            given["min_losses"] = tuple(lowest_K[self._known_K])
        self._balancer = BALANCERS[self._kind](**given)
        self.weight_K = self._weight_K = np.full(len(dataset.tasks), 1 / len(dataset.tasks))
        self._cost = _cost(self._draws, self._kind, self._balancer, arguments)

    @property
    def wants_first_losses(self) -> bool:
        """Whether the balancer needs the losses of the whole validation split before the first step."""
        return self._kind == "coba" and self._state is None

    def begin(self, trainer: Trainer, log: RunLog, progress: Progress, first_loss_K: np.ndarray | None) -> None:
        """Start the balancer with draw 0, unless it goes on from a checkpoint; its weights hold then.

        Args:
            first_loss_K: fp64 [K], NaN where unknown; where :attr:`wants_first_losses`.
        """
        if self._balancer is not None:
            log.say(self._cost)
            missing = [name for name, known in zip(self._dataset.tasks, self._known_K, strict=True) if not known]
            if missing:
                log.write(
                    event_record(
                        progress,
                        "warning",
                        reason=f"--task-balance {self._kind}: no validation data; these tasks get the mean weight",
                        tasks=missing,
                    )
                )
            if self._state is None:
                known = int(self._known_K.sum())
                first = None if first_loss_K is None else torch.from_numpy(first_loss_K[self._known_K])
                self._state, self._begun = self._balancer.begin(known, first), progress.step
                self._draw(trainer, log, progress)
        self._apply()

    def after_step(self, trainer: Trainer, log: RunLog, progress: Progress) -> bool:
        """Draw where a draw is due; the new weights hold for the next step. Returns whether there was a draw."""
        draws = self._balancer is not None and progress.step % self._balancer.update_interval == 0
        if draws:
            self._draw(trainer, log, progress)
        self._apply()
        return draws

    def stop_tasks(self, active_K: np.ndarray) -> None:
        """From the next step on, tasks that are not active have weight 0."""
        self._active_K = active_K
        self._apply()

    def _apply(self) -> None:
        self.weight_K = np.where(self._active_K, self._weight_K, 0.0)

    def _draw(self, trainer: Trainer, log: RunLog, progress: Progress) -> None:
        number = 0 if self._kind == "famo" else progress.step // self._balancer.update_interval
        loss_K = trainer.task_losses(self._dataset, self._draws.rows(number))
        loss = torch.from_numpy(loss_K[self._known_K])
        if not loss.isfinite().all():
            raise InputError(
                f"step {progress.step}: a validation loss is not finite ({loss_K.tolist()}); training has diverged. "
                "Lower --lr, and continue from the last checkpoint with --load"
            )
        self._state, weight, took_part = self._balancer.update(self._state, loss, progress.step - self._begun)
        if not weight.isfinite().all():
            raise InputError(
                f"step {progress.step}: the weights of --task-balance {self._kind} are {weight.tolist()}; its options "
                "are too large for fp64, use values nearer to their defaults"
            )
        known_K = torch.from_numpy(self._known_K)
        weight_K = mean_for_others(weight, known_K)
        self._weight_K = process_groups.from_main(weight_K).numpy()
        self._name_those_left_out(took_part, log, progress)

    def _name_those_left_out(self, took_part: torch.Tensor, log: RunLog, progress: Progress) -> None:
        known = np.flatnonzero(self._known_K)
        left_out = tuple(self._dataset.tasks[task] for task in known[~took_part.numpy()])
        if left_out and left_out != self._left_out:
            reason = "flat validation curve or one point only; these tasks get the mean weight"
            log.write(event_record(progress, "warning", reason=reason, tasks=list(left_out)))
        self._left_out = left_out

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        weight_K = torch.from_numpy(self._weight_K)
        return {"kind": self._kind, "weight_K": weight_K, "balancer": self._state, "begun": self._begun}

    def load(self, state: dict[str, Any], log: RunLog, progress: Progress) -> None:
        """Go on from a checkpoint's state; another balancer than the checkpoint's starts anew, and the log says so."""
        if state["kind"] != self._kind:
            reason = f"--task-balance {self._kind} starts anew: until here the weights were {state['kind']}"
            log.write(event_record(progress, "warning", reason=reason))
        elif self._balancer is not None:
            self._state, self._begun = state["balancer"], state["begun"]
            self._weight_K = state["weight_K"].numpy()


def _options_of(kind: str, options: MultiTaskArguments) -> dict[str, Any]:
    """The options of one balancer, by the names of its fields."""
    prefix = kind.replace("-", "_") + "_"
    return {
        field.name.removeprefix(prefix): getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name.startswith(prefix) and field.name != "famo_min_losses"
    }


def _cost(draws: ValidationDraws, kind: str, balancer: Any, arguments: Arguments) -> str:
    """What draws cost beside training, before anything is measured, in words."""
    every, batch = balancer.update_interval, arguments.training.global_batch_size
    rows = max(len(draws.rows(number)) for number in range(LOOKED_AT))
    computed = -(-rows // arguments.batch_multiple) * arguments.batch_multiple
    share = FORWARD_SHARE * computed / (every * batch)
    text = (
        f"--task-balance {kind}: draws of up to {rows} packs ({balancer.sample_valid_num} asked for), {computed} with "
        f"the empty ones that fill up the ranks, every {every} step(s) of {batch} packs: about "
        f"{math.ceil(100 * share)} % of the training's computation"
    )
    if share <= DEAR:
        return text
    return f"{text}; --{kind}-update-interval {math.ceil(every * share / DEAR)} would bring it below {DEAR:.0%}"

"""The account of each task's share of the objective since the start of a run.

::

    a step of G packs: Σ c_t by task, on the device ─► realised_K += G · C_K ─┐
    weights w_i of the step, on the host ─► target_K += G · w_K / W ──────────┴─► read at log lines and checkpoints

A step counts by its packs, so that with ``--mft-normalization epoch`` the realised shares are exactly the targets at
the end of every epoch, also while batches grow. A step that updated nothing does not count.
"""

import dataclasses
from typing import TypedDict

import numpy as np
import torch

from mft_megatron.batch import StepPlan, TaskCounts
from mft_megatron.data.loading.dataset import PackedSplit
from mft_megatron.losses.table import LOSSES
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.trainer import StepReport


class AccountState(TypedDict):
    """The account in a checkpoint: ``realised_K`` and ``target_K`` fp64 [K], and what :class:`RunShares` counts.

    ``loss``: the objective that it is of. ``normalizations``: those of its steps.
    """

    loss: str
    normalizations: list[str]
    began: int
    steps: int
    packs: int
    realised_K: torch.Tensor
    target_K: torch.Tensor
    weighted_K: list[int]
    absent_K: list[int]


@dataclasses.dataclass(frozen=True)
class RunShares:
    """The account up to a step, on the host.

    Attributes:
        steps: steps that count.
        packs: their packs.
        realised_K: fp64 [K], Σ over steps of G · C_i, where C_i = Σ c_t of the task's tokens in the step.
        target_K: fp64 [K], Σ over steps of G · w_i / W over all tasks with a weight and training data, present in the
            step or not; 0 where weights are no target shares.
        weighted_K: int64 [K], steps in which the task had a weight.
        absent_K: int64 [K], those of them without a supervised token of the task.
        normalizations: ``--mft-normalization`` of these steps: one, or several where it was changed.
        began: packs that had been consumed when counting began.
        weights_changed: whether the last step had weights other than the steps before it, on the whole.
    """

    steps: int
    packs: int
    realised_K: np.ndarray
    target_K: np.ndarray
    weighted_K: np.ndarray
    absent_K: np.ndarray
    normalizations: tuple[str, ...]
    began: int = 0
    weights_changed: bool = False

    @property
    def share_K(self) -> np.ndarray | None:  # noqa: N802  (a shape suffix)
        """Realised shares, fp64 [K], sum 1; ``None`` before the first step."""
        return _shares(self.realised_K)

    @property
    def target_share_K(self) -> np.ndarray | None:  # noqa: N802  (a shape suffix)
        """Target shares, fp64 [K], sum 1; ``None`` where there are none."""
        return _shares(self.target_K)


class ShareAccount:
    """The account of a run; the same on every rank, since a step's sums are over all ranks."""

    def __init__(self, split: PackedSplit, loss: str, normalization: str, began: int = 0):
        """Start at 0.

        Args:
            split: that is trained on.
            loss: ``--mft-loss``.
            normalization: ``--mft-normalization``.
            began: packs that have been consumed so far.
        """
        self._name, self._normalization, self._began = loss, normalization, began
        self._known_K = divisors(split.totals, LOSSES[loss].sample_means) > 0
        num_tasks = split.num_tasks
        self._steps, self._packs = 0, 0
        self._realised_K = torch.zeros(num_tasks, dtype=torch.float64, device=devices.device())
        self._target_K, self._last_target_K = np.zeros(num_tasks), np.zeros(num_tasks)
        self._weighted_K, self._absent_K = np.zeros(num_tasks, np.int64), np.zeros(num_tasks, np.int64)
        self._normalizations: list[str] = []

    @property
    def steps(self) -> int:
        """Steps that were counted."""
        return self._steps

    def count(self, plan: StepPlan, report: StepReport) -> None:
        """Count a step that has updated the weights; the host does not wait for the device."""
        loss, packs = LOSSES[self._name], plan.num_packs
        self._steps += 1
        self._packs += packs
        self._realised_K.add_(report.share_K, alpha=packs)
        weight_K = np.where(self._known_K, report.weight_K, 0.0)
        if loss.weighted:
            self._last_target_K = weight_K / weight_K.sum()
            self._target_K += packs * self._last_target_K
        has_weight_K = weight_K > 0
        self._weighted_K += has_weight_K
        self._absent_K += has_weight_K & (divisors(plan.counts, loss.sample_means) == 0)
        if self._normalization not in self._normalizations:
            self._normalizations.append(self._normalization)

    def read(self) -> RunShares:
        """The account so far; waits for the device."""
        return RunShares(
            self._steps,
            self._packs,
            self._realised_K.cpu().numpy().copy(),
            self._target_K.copy(),
            self._weighted_K.copy(),
            self._absent_K.copy(),
            tuple(self._normalizations),
            self._began,
            self._weights_changed(),
        )

    def _weights_changed(self) -> bool:
        as_last_K = self._packs * self._last_target_K
        return bool(as_last_K.any()) and not np.allclose(self._target_K, as_last_K, rtol=1e-9, atol=0)

    def state(self) -> AccountState:
        """The state for a checkpoint."""
        return {
            "loss": self._name,
            "normalizations": list(self._normalizations),
            "began": self._began,
            "steps": self._steps,
            "packs": self._packs,
            "realised_K": self._realised_K.cpu().clone(),
            "target_K": torch.from_numpy(self._target_K.copy()),
            "weighted_K": self._weighted_K.tolist(),
            "absent_K": self._absent_K.tolist(),
        }

    def load(self, state: AccountState) -> str | None:
        """Continue from a checkpoint's state.

        Returns:
            the reason why it does not fit, after which nothing has changed; ``None`` where it fits.
        """
        if state["loss"] != self._name:
            return f"--mft-loss was {state['loss']} so far"
        self._normalizations = list(state["normalizations"])
        self._began, self._steps, self._packs = state["began"], state["steps"], state["packs"]
        self._realised_K = state["realised_K"].to(self._realised_K.device, copy=True)
        self._target_K = state["target_K"].numpy().copy()
        self._weighted_K, self._absent_K = (np.array(state[name], np.int64) for name in ("weighted_K", "absent_K"))
        return None


def divisors(counts: TaskCounts, by_samples: bool) -> np.ndarray:
    """The sums that a loss divides by: ``M_i`` where samples count equally, else ``T_i``; fp64 [K]."""
    return counts.sample_weights_K if by_samples else counts.token_weights_K


def _shares(mass_K: np.ndarray) -> np.ndarray | None:
    total = mass_K.sum()
    return mass_K / total if total > 0 else None

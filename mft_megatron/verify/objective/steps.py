"""Steps of a run, forward and backward without an update: as the run computes them, and as the reference does.

::

    Trainer on all ranks ─► losses, shares, whole gradients ──────────────┐
    weights, gathered ─► fp64 model in one process, one text after another ┴─► comparison
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedSplit
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.errors import InputError
from mft_megatron.mcore.parallel.whole_tensors import gather_gradients
from mft_megatron.mcore.reference_model import ReferenceModel
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.training.saving.data_order import order_version

from .terms import StoredSamples, Text, Totals, coefficients, count, count_pass, targets, task_factors

# whether the gradient of the weight of this name is compared
Chosen = Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The gradient of a weight.

    Attributes:
        value: the whole weight's, on the CPU.
        disagreement: the largest relative difference of two ranks' copies of it.
    """

    value: Tensor
    disagreement: float = 0.0


@dataclasses.dataclass(frozen=True)
class Step:
    """Results of a step.

    Attributes:
        loss: the objective.
        tokens_K: int64 [K], supervised tokens of each task.
        task_loss_K: fp64 [K], mean token loss, weighted as tokens are; NaN for absent tasks.
        share_K: fp64 [K], Σ c_t of each task over Σ c_t.
        total: Σ c_t of all tasks.
        gradients: of the chosen weights, by name.
    """

    loss: float
    tokens_K: np.ndarray
    task_loss_K: np.ndarray
    share_K: np.ndarray
    total: float
    gradients: Mapping[str, Gradient]


class _WithoutUpdate:
    """Megatron-Core's optimizer, whose steps change nothing: gradients stay as they were reduced."""

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer

    def step(self) -> tuple[bool, None, None]:
        """Leave weights, states and gradients as they are."""
        return True, None, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def first_plans(arguments: Arguments, split: PackedSplit, steps: int) -> Iterator[StepPlan]:
    """Plan the next steps of a run, from the step that it starts or resumes at; fewer where it ends before."""
    taken, consumed = arguments.progress
    version = order_version(arguments, split.dataset)
    for _ in range(min(steps, arguments.training.train_iters - taken)):
        plan = plan_step(
            split,
            seed=arguments.initialization.seed,
            global_batch_size=arguments.batch_sizes.after(consumed),
            consumed_samples=consumed,
            end=arguments.total_packs,
            batch_multiple=arguments.batch_multiple,
            order_version=version,
        )
        consumed += plan.num_packs
        yield plan


def run_steps(
    trainer: Trainer, split: PackedSplit, plans: Sequence[StepPlan], weight_K: np.ndarray, chosen: Chosen
) -> list[Step | None]:
    """Run the trainer's own steps on this layout, without updates; a collective of all ranks.

    Args:
        trainer: with the weights that all steps are computed with.
        split: that the plans were made from.
        plans: of the steps.
        weight_K: fp64 [K], as for :meth:`Trainer.train_step`.
        chosen: weights whose gradients are gathered.

    Returns:
        a step for each plan, ``None`` for one that the trainer skips; gradients on the main process alone.
    """
    trainer.optimizer = _WithoutUpdate(trainer.optimizer)
    steps: list[Step | None] = []
    for plan in plans:
        report = trainer.train_step(split, plan, weight_K)
        if report is None:
            steps.append(None)
            continue
        scale = report.loss_scale or 1.0
        gradients = {
            name: Gradient(whole.value.double() / scale, whole.disagreement)
            for name, whole in gather_gradients(trainer.chunks, chosen).items()
        }
        share_K = report.share_K.cpu().numpy()
        steps.append(
            Step(
                report.loss,
                report.tokens_K.cpu().numpy().round().astype(np.int64),
                (report.loss_K / report.token_weights_K).cpu().numpy(),
                share_K / share_K.sum(),
                float(share_K.sum()),
                gradients,
            )
        )
    return steps


class Reference:
    """The same steps in one process: every text alone in its row, in fp64, and the objective term by term."""

    def __init__(self, arguments: Arguments, split: PackedSplit, weight_K: np.ndarray, chosen: Chosen):
        """Count the pass where its counts normalise a step.

        Args:
            arguments: of the run.
            split: that is trained on.
            weight_K: fp64 [K], ``w_i`` or ``alpha_i``.
            chosen: weights whose gradients are computed.
        """
        options = arguments.multi_task
        self._loss, self._gamma, self._detach = options.mft_loss, options.focal_gamma, options.focal_detach
        self._split, self._weight_K, self._chosen = split, weight_K, chosen
        self._samples = StoredSamples(split.dataset)
        self._pass = count_pass(self._samples, split) if options.mft_normalization == "epoch" else None

    def texts(self, plan: StepPlan) -> tuple[list[Text], Totals]:
        """Read the texts of a step, and count them."""
        texts = list(self._samples.texts(self._split, plan.packs_G.tolist()))
        return texts, count(texts, plan.num_packs, self._split.num_tasks)

    def targets(self, plan: StepPlan) -> np.ndarray | None:
        """The share that each task should have, fp64 [K]; ``None`` for losses without a target."""
        return targets(self._loss, self._weight_K, self.texts(plan)[1], self._pass)

    def step(self, model: ReferenceModel, plan: StepPlan, loss_scale: float = 1.0) -> Step | None:
        """Compute a step, with a loss scale for a model in fp16; ``None`` where no token of it counts."""
        texts, totals = self.texts(plan)
        factor_K = task_factors(self._loss, self._weight_K, totals, self._pass)
        present_K = totals.token_weights_K > 0
        if not factor_K[present_K].any():
            return None
        model.clear_gradients()
        loss, loss_K, share_K = 0.0, np.zeros(len(factor_K)), np.zeros(len(factor_K))
        for text in texts:
            if text.supervised:
                losses = model.token_losses(text.tokens)
                coefficient = self._coefficients(losses, text, float(factor_K[text.task]))
                part = (coefficient * losses).sum()
                (part * loss_scale).backward()
                loss += part.item()
                share_K[text.task] += coefficient.sum().item()
                weights = text.sample_weight * text.turn_weights
                loss_K[text.task] += weights @ losses.detach().cpu().numpy()
        gradients = {name: Gradient(value / loss_scale) for name, value in model.gradients(self._chosen).items()}
        with np.errstate(invalid="ignore"):
            task_loss_K = loss_K / totals.token_weights_K
        total = float(share_K.sum())
        return Step(loss, totals.tokens_K, task_loss_K, share_K / total, total, gradients)

    def _coefficients(self, losses: Tensor, text: Text, factor: float) -> Tensor:
        """``c_t`` of the tokens of a text, fp64 [n - 1]; of focal-sample it depends on the losses (Eq. 2)."""
        linear = torch.from_numpy(coefficients(self._loss, text, factor)).to(losses.device)
        if self._loss != "focal-sample":
            return linear
        modulating = losses.detach() if self._detach else losses
        weights = torch.from_numpy(text.turn_weights).to(losses.device)
        miss = -(weights * torch.expm1(-modulating)).sum() / weights.sum()
        return linear * miss**self._gamma


def refuse_infinite(step: Step) -> None:
    """Refuse gradients that are not finite, which in fp16 the loss scale does; in other precisions they are a fault.

    Raises:
        InputError: there is one.
    """
    if not all(gradient.value.isfinite().all() for gradient in step.gradients.values()):
        raise InputError(
            "gradients are not finite in fp16; give a --loss-scale that the model can be trained with, such as 1024"
        )

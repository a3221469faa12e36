"""One optimizer step and one evaluation pass: pipeline schedule, objective, reduction.

::

    StepPlan ─► MicroBatches of this rank ─► token losses l_t ───┐
    T_i, M_i of the global batch or epoch, w_i ─► factors [K] ───┴─► objective ─► backward, summed over ranks ─► Adam

Every rank builds its micro-batches from the plan; nothing about a batch is sent. Reports are fp64 sums over the whole
global batch, from one all-reduce after the schedule has run.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mft_megatron import progress_marks
from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import StepPlan, TaskCounts
from mft_megatron.data.loading.dataset import PackedDataset, PackedSplit, Rows
from mft_megatron.data.loading.micro_batches import MicroBatches, UsageByEpoch
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.losses.objective import SUMS, Objective, Slope, StepFactors, WeighedTokens
from mft_megatron.mcore.model.gpt import build_model
from mft_megatron.mcore.model.parameters import count_parameters
from mft_megatron.mcore.optim.guarded_step import Judge, guarded_step
from mft_megatron.mcore.optim.optimizer import build_optimizer, build_scheduler, learning_rate, loss_scale
from mft_megatron.mcore.output_layer.slice_losses import SliceLoss, SliceLosses
from mft_megatron.mcore.parallel.data_parallel import WeightGathering
from mft_megatron.mcore.parallel.device_batch import DeviceBatch, to_device
from mft_megatron.mcore.parallel.host_copies import copy_for_later, copy_together
from mft_megatron.mcore.parallel.message_shapes import message_shapes
from mft_megatron.mcore.platform.pipeline_messages import take_known_shapes

from .moe import experts
from .parallel import process_groups
from .platform import devices

# the width of a padded micro-batch is a multiple of this many tokens
WIDTH_MULTIPLE = 64
# A rank that asks all to leave adds this to a sum of supervised tokens: fp64 adds whole numbers below 2^53 exactly, so
# that the tokens of a step, fewer than this, and the requests of up to 8,192 ranks can be told apart.
REQUEST = 2.0**40
_TOKENS = SUMS.index("tokens_K")
# as Megatron expects it: the sum to differentiate, a number of tokens, and figures to be logged
MegatronLoss: TypeAlias = tuple[Tensor, Tensor, dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """Sums over all batches of an evaluation and over all ranks; tensors stay on the device until they are read.

    Attributes:
        loss_K: Σ l_t over supervised tokens of each task, times their weights, fp64.
        tokens_K: supervised tokens of each task, fp64.
        token_weights_K: Σ of their weights, fp64; ``loss_K`` divided by it is the task's loss.
        objective_K: each task's part of the objective, fp64.
        share_K: Σ c_t of each task, fp64.
    """

    loss_K: Tensor
    tokens_K: Tensor
    token_weights_K: Tensor
    objective_K: Tensor
    share_K: Tensor

    @property
    def loss(self) -> float:
        """The objective: the sum of the tasks' parts."""
        return self.objective_K.sum().item()


@dataclasses.dataclass(frozen=True)
class StepReport(EvaluationReport):
    """The same sums over the global batch of a step, and the step's update.

    Attributes:
        weight_K: fp64, the tasks' weights ``w_i`` of this step.
        learning_rate: of this step.
        scale: loss scale of this step, fp32 [1] on the device; ``None`` where the precision needs none.
        overflow: whether gradients were too large for the loss scale, so that nothing was updated; losses may then be
            NaN or infinite.
        refused: why the judge of the step refused it, so that nothing was updated; ``None`` where it did not.
        grad_norm: before clipping; ``None`` after an overflow.
        zeros_in_grad: elements of the gradients that are 0; ``None`` where they are not counted.
        expert_losses: balancing and z losses by Megatron's name, fp64 [layers], without coefficient; means over the
            step's micro-batches. NaN for layers without experts.
        requests: number of ranks whose ``leave_requested`` was true, fp64 [] on the host, where it is since the
            gradient norm was read; ``None`` where it is not asked.
    """

    weight_K: np.ndarray
    learning_rate: float
    scale: Tensor | None = None
    overflow: bool = False
    refused: str | None = None
    grad_norm: float | None = None
    zeros_in_grad: int | None = None
    expert_losses: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    requests: Tensor | None = None

    @property
    def updated(self) -> bool:
        """Whether the step updated the weights."""
        return not self.overflow and self.refused is None

    @property
    def loss_scale(self) -> float | None:
        """Loss scale of this step, read from the device; ``None`` where the precision needs none."""
        return None if self.scale is None else self.scale.item()

    def leave_requested(self) -> bool:
        """Whether a rank asks all to leave after this step; the same on all ranks."""
        return self.requests is not None and self.requests.item() > 0


class EvaluationInterruptedError(Exception):
    """An evaluation was given up on all ranks, because one asked for it."""


class Trainer:
    """A model and its optimizer on this rank: training steps and evaluations.

    Attributes:
        arguments: of the whole run.
        num_tasks: ``K``.
        objective: the loss of training steps.
        statistics: of earlier steps, by task; focal-task reads them.
        usage: sample slices that this rank has trained on.
        left_out: sample slices of this rank that were planned and left out, with the whole global batch.
        chunks: this rank's chunks of the model.
        optimizer: Megatron-Core's.
        scheduler: of the learning rate and the weight decay.
        weights: read weights between steps within ``weights.whole()``; see
            :class:`.parallel.data_parallel.WeightGathering`.
        ranks: position of this rank in its data-parallel group.
        leave_requested: asked in each step: whether this rank wants all to leave after it. ``None``: not asked.
        interrupt_requested: asked in each batch of an evaluation: whether this rank wants all to give it up.
    """

    def __init__(self, arguments: Arguments, vocab_size: int, num_tasks: int):
        """Build the model and the optimizer.

        Args:
            arguments: of the whole run.
            vocab_size: size of the vocabulary without padding.
            num_tasks: ``K``.
        """
        self.arguments = arguments
        self.num_tasks = num_tasks
        options = arguments.multi_task
        self.objective = Objective(
            options.mft_loss, options.focal_gamma, options.focal_detach, options.mft_normalization == "micro-batch"
        )
        self.statistics = TaskStatistics.none(num_tasks, devices.device())
        self.usage, self.left_out = UsageByEpoch(num_tasks), UsageByEpoch(num_tasks)
        self.chunks: list[DistributedDataParallel] = build_model(arguments, vocab_size)
        self.optimizer: MegatronOptimizer = build_optimizer(arguments, self.chunks)
        self.scheduler: OptimizerParamScheduler = build_scheduler(arguments, self.optimizer)
        self.weights = WeightGathering(arguments, self.chunks)
        self.ranks = process_groups.ranks()
        self.leave_requested: Callable[[], bool] | None = None
        self.interrupt_requested: Callable[[], bool] | None = None
        take_known_shapes()
        self._schedule = get_forward_backward_func()
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = _finalize_without_rescaling
            chunk.config.grad_scale_func = self.optimizer.scale_loss

    def train_step(
        self, split: PackedSplit, plan: StepPlan, weight_K: np.ndarray, judge: Judge | None = None
    ) -> StepReport | None:
        """Consume one global batch and update the weights.

        Args:
            split: the split that the plan was made from.
            plan: of the step.
            weight_K: fp64 [K], weight ``w_i`` of each task, ``alpha_i`` of the focal losses.
            judge: may refuse the step before anything is updated, unless gradients overflow.

        Returns:
            the report; or ``None`` where no task with a weight has a supervised token in the batch: then nothing
            changes, on any rank. Where gradients overflow, only the loss scale changes. A step that was refused changes
            no weights, states, statistics or schedules, and its packs count as left out; random numbers go on.
        """
        micro_batches = self._micro_batches(split, plan)
        tokens_K, samples_K = _sums_of_weights([plan.counts])
        if not self.objective.supervises(tokens_K, samples_K, torch.from_numpy(weight_K)):
            micro_batches.skip()
            micro_batches.add_used_to(self.usage)
            return None
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        experts.begin_step(self.chunks, plan.num_packs / self.arguments.training.micro_batch_size)
        factors, samples_K = self._factors(split, plan, weight_K)
        biases = experts.biases(self.chunks) if judge is not None else ()
        sums, requests = self._run(self.objective, factors, micro_batches, False, self.leave_requested)
        report = StepReport(
            **vars(_report(self.objective, factors, sums, samples_K)),
            weight_K=weight_K,
            learning_rate=learning_rate(self.optimizer),
            scale=loss_scale(self.optimizer),
            expert_losses=experts.losses_of_step(self.chunks, self.arguments),
            requests=None if requests is None else copy_for_later(requests),
        )
        progress_marks.mark("optimizer")
        stepped = guarded_step(self.optimizer, judge, report.loss_K, report.token_weights_K, report.objective_K)
        # experts have an optimizer of their own, which not all ranks share
        overflows = not stepped.updated and stepped.refused is None
        if report.scale is not None and process_groups.any_rank(overflows):
            micro_batches.add_used_to(self.usage)
            return dataclasses.replace(report, overflow=True)
        report = dataclasses.replace(report, grad_norm=stepped.grad_norm, zeros_in_grad=stepped.zeros_in_grad)
        if stepped.refused is not None:
            for bias, before in biases:
                bias.copy_(before)
            micro_batches.add_used_to(self.left_out)
            return dataclasses.replace(report, refused=stepped.refused)
        micro_batches.add_used_to(self.usage)
        self.weights.after_update()
        self.scheduler.step(increment=1)
        self.statistics = self.objective.statistics_after(self.statistics, sums, samples_K)
        return report

    def forget_progress(self) -> None:
        """Begin to count slices and steps of the schedule again, before a run that goes back loads a checkpoint."""
        self.usage, self.left_out = UsageByEpoch(self.num_tasks), UsageByEpoch(self.num_tasks)
        # Megatron-Core adds a checkpoint's steps to those that were taken
        self.scheduler.num_steps = 0

    def leave_out(self, split: PackedSplit, plan: StepPlan) -> None:
        """Count a global batch as left out; nothing is computed.

        Args:
            split: the split that the plan was made from.
            plan: of the step.
        """
        micro_batches = self._micro_batches(split, plan)
        micro_batches.skip()
        micro_batches.add_used_to(self.left_out)

    def evaluate(self, split: PackedSplit, plans: Sequence[StepPlan], weight_K: np.ndarray) -> EvaluationReport:
        """Compute the losses of every task over some batches; no state changes.

        The objective is that of all batches as a single one, for every ``--mft-normalization``: their counts are summed
        first.

        Args:
            split: the split that the plans were made from.
            plans: of the batches, at least one.
            weight_K: as in :meth:`train_step`.

        Raises:
            EvaluationInterruptedError: ``interrupt_requested`` was true on a rank; on all ranks after the same batch.
        """
        objective = dataclasses.replace(self.objective, per_micro_batch=False)
        tokens_K, samples_K = _sums_of_weights([plan.counts for plan in plans])
        factors = objective.before_step(tokens_K, samples_K, torch.from_numpy(weight_K), self.statistics)
        asked = self.interrupt_requested
        sums = (self._forward_only(objective, factors, self._micro_batches(split, plan), asked) for plan in plans)
        return _report(objective, factors, reduce(torch.add, sums), samples_K)

    def task_losses(self, dataset: PackedDataset, rows: Rows) -> np.ndarray:
        """Compute the mean token loss of each task over some rows; no state changes.

        Args:
            dataset: of the rows.
            rows: the sample slices of each row, for all ranks.

        Returns:
            fp64 [K], weighted like the tokens in training, the same on every rank; NaN for a task without a supervised
            token in these rows.
        """
        zero_K = torch.zeros(self.num_tasks, dtype=torch.float64)
        micro_batches = MicroBatches.of_draw(
            dataset,
            rows,
            self.ranks,
            self.arguments.training.micro_batch_size,
            self.arguments.batch_multiple,
            self._width_multiple(),
        )
        sums = self._forward_only(Objective("token"), StepFactors(zero_K, zero_K, zero_K), micro_batches)
        return (sums[SUMS.index("loss_K")] / sums[SUMS.index("token_weights_K")]).cpu().numpy()

    def slice_losses(self, split: PackedSplit, plan: StepPlan) -> list[SliceLoss]:
        """Compute the mean token loss of each sample slice of a batch; no state changes; a collective.

        Returns:
            those of this rank's micro-batches, without slices that supervise nothing; empty on ranks that report no
            losses.
        """
        micro_batches = self._micro_batches(split, plan)
        losses = SliceLosses(micro_batches.rows)
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad(), self.weights.whole():
            self._pipeline(losses.of_batch, micro_batches, forward_only=True)
        return losses.found

    def num_parameters(self, trained: bool = False) -> int:
        """Number of parameters of the whole model, or of the ``trained`` ones.

        The padding of the vocabulary counts; tied weights count once.
        """
        return count_parameters(self.chunks, trained)

    def _factors(self, split: PackedSplit, plan: StepPlan, weight_K: np.ndarray) -> tuple[StepFactors, Tensor]:
        """Factors of a step, normalised over its global batch or, with ``--mft-normalization epoch``, over an epoch.

        Returns:
            the factors, and ``M_i`` of the step, fp64 [K]; on the device.
        """
        counts, num_batches = plan.counts, 1.0
        if self.arguments.multi_task.mft_normalization == "epoch":
            counts, num_batches = split.totals, split.num_packs / plan.num_packs
        num_micro_batches = plan.num_packs / self.arguments.training.micro_batch_size
        arrays = (counts.token_weights_K, counts.sample_weights_K, weight_K, plan.counts.sample_weights_K)
        *over_K, samples_K = copy_together(arrays, [torch.float64] * len(arrays), devices.device())
        before, sizes = self.statistics, (num_micro_batches, num_batches)
        return self.objective.before_step(over_K[0], over_K[1], over_K[2], before, *sizes), samples_K

    def _micro_batches(self, split: PackedSplit, plan: StepPlan) -> MicroBatches:
        micro_batch_size = self.arguments.training.micro_batch_size
        return MicroBatches.of_plan(split, plan, self.ranks, micro_batch_size, self._width_multiple())

    def _forward_only(
        self,
        objective: Objective,
        factors: StepFactors,
        micro_batches: MicroBatches,
        requested: Callable[[], bool] | None = None,
    ) -> Tensor:
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad(), self.weights.whole():
            sums, requests = self._run(objective, factors, micro_batches, True, requested)
        if requests is not None and requests.item() > 0:
            raise EvaluationInterruptedError
        return sums

    def _run(
        self,
        objective: Objective,
        factors: StepFactors,
        micro_batches: MicroBatches,
        forward_only: bool,
        requested: Callable[[], bool] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run this rank's micro-batches through the pipeline.

        Returns:
            sums: fp64 [len(SUMS), K], summed over all ranks.
            requests: number of ranks where ``requested`` is true, fp64 []; ``None`` where it is not asked.
        """
        sums = torch.zeros(len(SUMS), self.num_tasks, dtype=torch.float64, device=devices.device())
        factors = factors.to(sums.device)
        self._pipeline(partial(_MicroBatchObjective, objective, factors, sums), micro_batches, forward_only)
        progress_marks.mark("sums of all ranks")
        if requested is None:
            return process_groups.sum_over_world(sums), None
        if requested():
            sums[_TOKENS, 0] += REQUEST
        process_groups.sum_over_world(sums)
        requests = torch.floor(sums[_TOKENS, 0] / REQUEST)
        sums[_TOKENS, 0] -= requests * REQUEST
        return sums, requests

    def _pipeline(
        self, output_of: "Callable[[DeviceBatch], _Output]", micro_batches: MicroBatches, forward_only: bool
    ) -> None:
        """Run this rank's micro-batches through the pipeline; ``output_of`` each takes its token losses."""
        shapes = message_shapes(self.chunks[0].config, micro_batches.num_tokens) if micro_batches.padded else None
        for chunk in self.chunks:
            chunk.config.variable_seq_lengths = micro_batches.padded
            chunk.config.message_shapes = shapes
        batches = (to_device(batch) for batch in micro_batches)
        self._schedule(
            forward_step_func=partial(_forward, output_of),
            # every chunk iterates over the same micro-batches, not at the same time
            data_iterator=list(itertools.tee(batches, len(self.chunks))),
            model=self.chunks,
            num_microbatches=len(micro_batches),
            # a micro-batch is one stream of tokens in the pipeline; Megatron ignores this length where widths vary
            seq_length=self.arguments.training.micro_batch_size * self.arguments.data.seq_length,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _width_multiple(self) -> int:
        """Tokens that the width of a padded micro-batch is a multiple of.

        Context-parallel ranks and, with sequence parallelism, tensor-parallel ranks can then shard it evenly.
        """
        return math.lcm(WIDTH_MULTIPLE, self.arguments.distributed.stream_multiple)


def _sums_of_weights(counts: Sequence[TaskCounts]) -> tuple[Tensor, Tensor]:
    """``T_i`` and ``M_i`` of some packs together: fp64 [K] each, on the CPU."""
    tokens_K = np.sum([some.token_weights_K for some in counts], axis=0)
    samples_K = np.sum([some.sample_weights_K for some in counts], axis=0)
    return torch.from_numpy(tokens_K), torch.from_numpy(samples_K)


def _report(objective: Objective, factors: StepFactors, sums: Tensor, samples_K: Tensor) -> EvaluationReport:
    named = dict(zip(SUMS, sums, strict=True))
    by_task_K = objective.by_task(factors, sums, samples_K)
    return EvaluationReport(named["loss_K"], named["tokens_K"], named["token_weights_K"], by_task_K, named["share_K"])


class _Output(Protocol):
    """Takes the token losses of one micro-batch."""

    def slope(self, batch: DeviceBatch) -> Slope | None:
        """The gradient that they will receive, where it is known before them."""

    def of_losses(self, loss_T: Tensor) -> MegatronLoss:
        """Take the token losses; returns Megatron's 3-tuple."""


def _forward(
    output_of: Callable[[DeviceBatch], _Output],
    batches: Iterator[DeviceBatch],
    model: DistributedDataParallel,
) -> tuple[Tensor, Callable[[Tensor], MegatronLoss]]:
    """Run Megatron's forward step.

    Returns:
        output: of the stage.
        loss_function: of the output of the last stage.
    """
    batch = next(batches)
    output = output_of(batch)
    return model.module.run(batch, slope=output.slope), output.of_losses


class _MicroBatchObjective:
    """The objective of one micro-batch, on the stage with the output layer."""

    def __init__(self, objective: Objective, factors: StepFactors, sums: Tensor, batch: DeviceBatch):
        """Prepare; nothing is computed yet.

        Args:
            objective: of the step.
            factors: of the step, on this device.
            sums: fp64 [len(SUMS), K], of all micro-batches of this rank; added to.
            batch: the micro-batch.
        """
        self._objective, self._factors, self._sums, self._batch = objective, factors, sums, batch

    @functools.cached_property
    def _weighed(self) -> WeighedTokens:
        return self._objective.weigh(self._factors, self._batch)

    def slope(self, batch: DeviceBatch) -> Slope | None:
        """The gradient that the token losses of this micro-batch will receive, where it is known before them."""
        return self._objective.slope(self._factors, batch, self._weighed)

    def of_losses(self, loss_T: Tensor) -> MegatronLoss:
        """Compute the objective, and add its sums by task to those of the step.

        Args:
            loss_T: token losses, fp32 [1, B·S].

        Returns:
            Megatron's 3-tuple, with which it sums over micro-batches and ranks and does not rescale.
        """
        batch, shard = self._batch, self._batch.shard
        loss_BS = loss_T.view(batch.labels_BS.shape)
        value, coefficient_BS = self._objective.contribution(self._factors, batch, loss_BS, shard.sum, self._weighed)
        if process_groups.reports_losses():
            mine_BS = shard.token_mask(loss_BS.shape)
            num_tasks = self._sums.shape[1]
            self._sums += self._objective.sums(batch, loss_BS, coefficient_BS, num_tasks, mine_BS, self._weighed)
        return value, torch.zeros([], dtype=torch.int, device=value.device), {}


def _finalize_without_rescaling(
    model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **groups: Any
) -> None:
    """Reduce gradients over ranks as plain sums; Megatron would divide them by ``num_tokens``."""
    finalize_model_grads(model, None, **groups)

"""One optimizer step and one evaluation pass: pipeline schedule, objective, reduction.

::

    StepPlan ─► rows of this rank ─► Batch ─► token losses l_t ──┐
    T_i, M_i of the whole global batch, w_i ─► factors [K] ──────┴─► objective ─► backward, summed over ranks ─► Adam

Every rank builds its micro-batches from the plan itself; nothing about the batch is ever sent, but widths of padded
micro-batches between pipeline stages. Reports are sums over the whole global batch, in fp64, from one all-reduce after
the schedule has run.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedDataset, PackedSplit, Rows
from mft_megatron.data.loading.micro_batches import MicroBatches, UsageByEpoch
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.losses.objective import SUMS, Objective, StepFactors
from mft_megatron.mcore.model.gpt import build_model
from mft_megatron.mcore.model.parameters import count_parameters
from mft_megatron.mcore.optim.optimizer import build_optimizer, build_scheduler, learning_rate, loss_scale
from mft_megatron.mcore.parallel.data_parallel import WeightGathering
from mft_megatron.mcore.parallel.device_batch import DeviceBatch, to_device

from .moe import experts
from .parallel import process_groups
from .platform import devices

# a padded micro-batch is as wide as a multiple of this many tokens
WIDTH_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """Sums over all batches of an evaluation and over all ranks; tensors stay on the device until they are read.

    Attributes:
        loss_K: Σ l_t over supervised tokens of each task, fp64.
        tokens_K: supervised tokens of each task, fp64.
        objective_K: each task's part of the objective, fp64.
        share_K: Σ c_t of each task, fp64.
    """

    loss_K: Tensor
    tokens_K: Tensor
    objective_K: Tensor
    share_K: Tensor

    @property
    def loss(self) -> float:
        """The objective."""
        return self.objective_K.sum().item()


@dataclasses.dataclass(frozen=True)
class StepReport(EvaluationReport):
    """The same sums over the global batch of a step, and the step's update.

    Attributes:
        weight_K: fp64, the tasks' weights ``w_i`` of this step.
        learning_rate: of this step.
        loss_scale: of this step; ``None`` where the precision needs none.
        overflow: whether gradients were too large for the loss scale, so that nothing was updated; losses may then be
            no numbers.
        grad_norm: before clipping; ``None`` after an overflow.
        zeros_in_grad: elements of the gradients that are 0; ``None`` where they are not counted.
        expert_losses: balancing and z losses by Megatron's name, fp64 [layers], without coefficient; means over the
            step's micro-batches. NaN for layers without experts.
    """

    weight_K: np.ndarray
    learning_rate: float
    loss_scale: float | None = None
    overflow: bool = False
    grad_norm: float | None = None
    zeros_in_grad: int | None = None
    expert_losses: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Trainer:
    """A model, its optimizer and its schedule on this rank, and the things one does with them.

    ``usage``: what this rank has trained on. ``weights``: who reads weights between steps does so within
    ``weights.whole()``; see :class:`.parallel.data_parallel.WeightGathering`.
    """

    def __init__(self, arguments: Arguments, vocab_size: int, num_tasks: int):
        """
        Args:
            arguments: of the whole run.
            vocab_size: real size of the vocabulary.
            num_tasks: K.
        """
        self.arguments = arguments
        self.num_tasks = num_tasks
        options = arguments.multi_task
        self.objective = Objective(
            options.mft_loss, options.focal_gamma, options.focal_detach, options.mft_normalization == "micro-batch"
        )
        self.statistics = TaskStatistics.none(num_tasks, devices.device())
        self.usage = UsageByEpoch(num_tasks)
        self.chunks: list[DistributedDataParallel] = build_model(arguments, vocab_size)
        self.optimizer: MegatronOptimizer = build_optimizer(arguments, self.chunks)
        self.scheduler: OptimizerParamScheduler = build_scheduler(arguments, self.optimizer)
        self.weights = WeightGathering(arguments, self.chunks)
        self.ranks = process_groups.ranks()
        self._schedule = get_forward_backward_func()
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = _finalize_without_rescaling
            chunk.config.grad_scale_func = self.optimizer.scale_loss

    def train_step(self, split: PackedSplit, plan: StepPlan, weight_K: np.ndarray) -> StepReport | None:
        """Consume one global batch and update the weights.

        Args:
            split: that the plan is of.
            plan: of the step.
            weight_K: fp64 [K], weight ``w_i`` of each task, ``alpha_i`` of the focal losses.

        Returns:
            the report, or ``None`` where the batch has nothing to learn from (no supervised token of a task with a
            weight): then nothing is changed, on every rank alike. Where gradients overflow nothing but the loss scale
            is changed.
        """
        factors = self._factors(self.objective, [plan], weight_K)
        micro_batches = self._micro_batches(split, plan)
        if not factors.base_K.any():
            micro_batches.skip()
            micro_batches.add_used_to(self.usage)
            return None
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        experts.begin_step(self.chunks, len(plan.packs_G) // self.arguments.training.micro_batch_size)
        sums = self._run(self.objective, factors, micro_batches, forward_only=False)
        micro_batches.add_used_to(self.usage)
        samples_K = torch.from_numpy(plan.samples_K)
        report = StepReport(
            **vars(_report(self.objective, factors, sums, samples_K)),
            weight_K=weight_K,
            learning_rate=learning_rate(self.optimizer),
            loss_scale=loss_scale(self.optimizer),
            expert_losses=experts.losses_of_step(self.chunks, self.arguments),
        )
        updated, grad_norm, zeros = self.optimizer.step()
        # experts have an optimizer of their own, which not all ranks share
        if report.loss_scale is not None and process_groups.any_rank(not updated):
            return dataclasses.replace(report, overflow=True)
        self.weights.after_update()
        self.scheduler.step(increment=1)
        self.statistics = self.objective.statistics_after(self.statistics, sums, samples_K)
        return dataclasses.replace(report, grad_norm=grad_norm, zeros_in_grad=zeros)

    def evaluate(self, split: PackedSplit, plans: Sequence[StepPlan], weight_K: np.ndarray) -> EvaluationReport:
        """Token losses of every task over the given batches, without changing anything.

        The objective is that of all batches as one, whatever ``--mft-normalization`` says: their counts are added up
        first. ``weight_K`` as in :meth:`train_step`.
        """
        objective = dataclasses.replace(self.objective, per_micro_batch=False)
        factors = self._factors(objective, plans, weight_K)
        sums = sum(self._forward_only(objective, factors, self._micro_batches(split, plan)) for plan in plans)
        return _report(objective, factors, sums, torch.from_numpy(sum(plan.samples_K for plan in plans)))

    def task_losses(self, dataset: PackedDataset, rows: Rows) -> np.ndarray:
        """Mean token loss of each task over some rows, without changing anything.

        Returns:
            fp64 [K], the same on every rank; NaN for a task without a supervised token in these rows.
        """
        nothing = torch.zeros(self.num_tasks, dtype=torch.float64)
        micro_batches = MicroBatches.of_draw(
            dataset,
            rows,
            self.ranks,
            self.arguments.training.micro_batch_size,
            self.arguments.batch_multiple,
            self._width_multiple(),
        )
        sums = self._forward_only(Objective("token"), StepFactors(nothing, nothing, nothing), micro_batches)
        loss_K, tokens_K = sums[SUMS.index("loss_K")], sums[SUMS.index("tokens_K")]
        return (loss_K / tokens_K).cpu().numpy()

    def num_parameters(self, trained: bool = False) -> int:
        """Parameters of the whole model, or those that are ``trained``; padding of the vocabulary counted in and shared
        weights counted once."""
        return count_parameters(self.chunks, trained)

    def _factors(self, objective: Objective, plans: Sequence[StepPlan], weight_K: np.ndarray) -> StepFactors:
        counts = (sum(plan.supervised_tokens_K for plan in plans), sum(plan.samples_K for plan in plans))
        num_micro_batches = sum(len(plan.packs_G) for plan in plans) // self.arguments.training.micro_batch_size
        numbers = (torch.from_numpy(values) for values in (*counts, weight_K))
        return objective.before_step(*numbers, self.statistics, num_micro_batches)

    def _micro_batches(self, split: PackedSplit, plan: StepPlan) -> MicroBatches:
        micro_batch_size = self.arguments.training.micro_batch_size
        return MicroBatches.of_plan(split, plan, self.ranks, micro_batch_size, self._width_multiple())

    def _forward_only(self, objective: Objective, factors: StepFactors, micro_batches: MicroBatches) -> Tensor:
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad(), self.weights.whole():
            return self._run(objective, factors, micro_batches, forward_only=True)

    def _run(
        self, objective: Objective, factors: StepFactors, micro_batches: MicroBatches, forward_only: bool
    ) -> Tensor:
        """Take this rank's micro-batches through the pipeline; the sums over all ranks, fp64 [len(SUMS), K]."""
        for chunk in self.chunks:
            # stages then tell each other the width of each micro-batch, which only rows of padded data sets differ in
            chunk.config.variable_seq_lengths = micro_batches.padded
        batches = (to_device(batch) for batch in micro_batches)
        sums = torch.zeros(len(SUMS), self.num_tasks, dtype=torch.float64, device=devices.device())
        factors = factors.to(sums.device)
        slope = partial(objective.slope, factors)
        self._schedule(
            forward_step_func=partial(_forward, partial(_objective, objective, factors, sums), slope),
            # every chunk goes through the same micro-batches, each at its own pace
            data_iterator=list(itertools.tee(batches, len(self.chunks))),
            model=self.chunks,
            num_microbatches=len(micro_batches),
            # a micro-batch travels through the pipeline as one stream of tokens; of padded ones no one asks this length
            seq_length=self.arguments.training.micro_batch_size * self.arguments.data.seq_length,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return process_groups.sum_over_world(sums)

    def _width_multiple(self) -> int:
        """What the width of a padded micro-batch is a multiple of, so that context-parallel ranks and, with sequence
        parallelism, tensor-parallel ranks can share it."""
        return math.lcm(WIDTH_MULTIPLE, self.arguments.distributed.stream_multiple)


def _report(objective: Objective, factors: StepFactors, sums: Tensor, samples_K: Tensor) -> EvaluationReport:
    named = dict(zip(SUMS, sums, strict=True))
    by_task_K = objective.by_task(factors, sums, samples_K)
    return EvaluationReport(named["loss_K"], named["tokens_K"], by_task_K, named["share_K"])


def _forward(loss_function, slope, batches: Iterator[DeviceBatch], model: DistributedDataParallel):
    """Megatron's forward step: the stage's output, and how the last stage makes a loss of it."""
    batch = next(batches)
    return model.module.run(batch, slope=slope), partial(loss_function, batch)


def _objective(objective: Objective, factors: StepFactors, sums: Tensor, batch: DeviceBatch, loss_BS: Tensor):
    """The objective of one micro-batch; adds the micro-batch's sums per task to ``sums`` [len(SUMS), K].

    The 3-tuple tells Megatron to add micro-batches and ranks up and to leave the result alone.
    """
    loss_BS = loss_BS.view(batch.labels_BS.shape)
    shard = batch.shard
    value, coefficient_BS = objective.contribution(factors, batch, loss_BS, shard.sum)
    if process_groups.reports_losses():
        sums += objective.sums(batch, loss_BS, coefficient_BS, sums.shape[1], shard.token_mask(loss_BS.shape))
    return value, torch.zeros([], dtype=torch.int, device=value.device), {}


def _finalize_without_rescaling(model, num_tokens=None, **groups) -> None:
    """Reduce gradients over ranks as plain sums; Megatron would divide by the number of tokens here."""
    finalize_model_grads(model, None, **groups)

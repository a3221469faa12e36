"""One optimizer step and one evaluation pass: pipeline schedule, objective, reduction.

::

    StepPlan ─► packs of this rank ─► Batch ─► token losses l_t ─┐
    T_i, M_i of the whole global batch, w_i ─► coefficients c_t ─┴─► Σ c_t·l_t ─► backward, summed over ranks ─► Adam

Every rank builds its micro-batches from the plan itself; nothing about the batch is ever sent. Reports are sums over
the whole global batch, in fp64, from one all-reduce after the schedule has run.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mft_megatron.arguments import Arguments
from mft_megatron.batch import Batch, StepPlan
from mft_megatron.data.dataset import PackedSplit
from mft_megatron.losses.coefficients import coefficients, task_factors, task_sums

from . import parallel, platform
from .model import build_model
from .optimizer import build_optimizer, build_scheduler, learning_rate

SUMS = ("loss_K", "tokens_K", "objective_K", "share_K")


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a step (or an evaluation) did, summed over all ranks; tensors stay on the device until they are read.

    ``loss_K``: Σ l_t over supervised tokens of each task. ``tokens_K``: how many those are.
    ``objective_K``: Σ c_t·l_t; ``share_K``: Σ c_t, both per task. All fp64 [K].
    ``weight_K``: the tasks' weights w_i that held. ``grad_norm``: before clipping. ``learning_rate``: of this step.
    """

    loss_K: Tensor
    tokens_K: Tensor
    objective_K: Tensor
    share_K: Tensor
    weight_K: np.ndarray | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None

    @property
    def loss(self) -> float:
        """The objective: Σ c_t·l_t."""
        return self.objective_K.sum().item()


class Trainer:
    """A model, its optimizer and its schedule on this rank, and the two things one does with them."""

    def __init__(self, arguments: Arguments, vocab_size: int, weight_K: np.ndarray):
        """
        Args:
            arguments: of the whole run.
            vocab_size: real size of the vocabulary.
            weight_K: fp64 [K], weight of each task; may be replaced between steps.
        """
        self.arguments = arguments
        self.weight_K = weight_K
        self.model: DistributedDataParallel = build_model(arguments, vocab_size)
        self.optimizer: MegatronOptimizer = build_optimizer(arguments, self.model)
        self.scheduler: OptimizerParamScheduler = build_scheduler(arguments, self.optimizer)
        self.ranks = parallel.ranks()
        self._schedule = get_forward_backward_func()
        self.model.config.finalize_model_grads_func = _finalize_without_rescaling
        self.model.config.grad_scale_func = self.optimizer.scale_loss

    def train_step(self, split: PackedSplit, plan: StepPlan) -> StepReport | None:
        """Consume one global batch and update the weights.

        Returns:
            the report, or ``None`` where the batch has nothing to learn from (no supervised token of a task with a
            weight): then nothing is changed, on every rank alike.
        """
        factor_K = self._factors(plan)
        if not factor_K.any():
            return None
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        report = self._run(split, plan, factor_K, forward_only=False)
        rate = learning_rate(self.optimizer)
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return dataclasses.replace(report, weight_K=self.weight_K, grad_norm=grad_norm, learning_rate=rate)

    def evaluate(self, split: PackedSplit, plans: Sequence[StepPlan]) -> StepReport:
        """Token losses of every task over the given batches, without changing anything.

        The objective is that of all batches as one: their counts are added up first.
        """
        self.model.eval()
        factor_K = self._factors(*plans)
        with torch.no_grad():
            reports = [self._run(split, plan, factor_K, forward_only=True) for plan in plans]
        return StepReport(*(sum(getattr(report, name) for report in reports) for name in SUMS))

    def num_parameters(self) -> int:
        """Parameters of the whole model, padding of the vocabulary counted in and shared weights counted once."""
        return parallel.count_parameters(self.model)

    def _factors(self, *plans: StepPlan) -> Tensor:
        tokens_K = sum(plan.supervised_tokens_K for plan in plans)
        samples_K = sum(plan.samples_K for plan in plans)
        counts = (tokens_K, samples_K, self.weight_K)
        return task_factors(self.arguments.multi_task.mft_loss, *(torch.from_numpy(count) for count in counts))

    def _run(self, split: PackedSplit, plan: StepPlan, factor_K: Tensor, forward_only: bool) -> StepReport:
        micro_batch_size = self.arguments.training.micro_batch_size
        packs = plan.micro_batches(self.ranks, micro_batch_size)
        sums = torch.zeros(len(SUMS), len(factor_K), dtype=torch.float64, device=platform.device())
        self._schedule(
            forward_step_func=partial(_forward, self.arguments.multi_task.mft_loss, factor_K.to(sums.device), sums),
            data_iterator=_batches(split, packs),
            model=self.model,
            num_microbatches=len(packs),
            # a micro-batch travels through the pipeline as one stream of tokens
            seq_length=micro_batch_size * self.arguments.data.seq_length,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return StepReport(*parallel.sum_over_world(sums))


def _batches(split: PackedSplit, packs: np.ndarray) -> Iterator[Batch]:
    for packs_B in packs:
        yield to_device(split.rows(packs_B))


def to_device(batch: Batch) -> Batch:
    """The same micro-batch as tensors on this process's device."""
    arrays = {
        field.name: torch.from_numpy(getattr(batch, field.name)).to(platform.device(), non_blocking=True)
        for field in dataclasses.fields(batch)
        if field.name != "max_seqlen"
    }
    return Batch(**arrays, max_seqlen=batch.max_seqlen)


def _forward(mode: str, factor_K: Tensor, sums: Tensor, batches: Iterator[Batch], model: DistributedDataParallel):
    """Megatron's forward step: the stage's output, and how the last stage makes a loss of it."""
    batch = next(batches)
    return model.module.run(batch), partial(_objective, mode, factor_K, sums, batch)


def _objective(mode: str, factor_K: Tensor, sums: Tensor, batch: Batch, loss_BS: Tensor):
    """Σ c_t·l_t of one micro-batch; adds the micro-batch's sums per task to ``sums`` [4, K].

    The 3-tuple tells Megatron to add micro-batches and ranks up and to leave the result alone.
    """
    loss_BS = loss_BS.view(batch.labels_BS.shape)
    coefficient_BS = coefficients(
        mode, factor_K, batch.task_ids_BS, batch.sample_ids_BS, batch.loss_mask_BS, batch.num_segments
    )
    objective = (coefficient_BS * loss_BS).sum(dtype=torch.float32)
    if parallel.counts_losses():
        mask_BS = batch.loss_mask_BS
        per_token = (loss_BS * mask_BS, mask_BS, coefficient_BS.double() * loss_BS, coefficient_BS)
        for row, value_BS in zip(sums, per_token, strict=True):
            row += task_sums(batch.task_ids_BS, value_BS, len(factor_K))
    return objective, torch.zeros([], dtype=torch.int, device=objective.device), {}


def _finalize_without_rescaling(model, num_tokens=None, **groups) -> None:
    """Reduce gradients over ranks as plain sums; Megatron would divide by the number of tokens here."""
    finalize_model_grads(model, None, **groups)

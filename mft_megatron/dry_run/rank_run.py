"""The real training steps of one rank of a layout, in this process, on a simulated GPU."""

import time
from fractions import Fraction

import numpy as np
import torch.distributed as dist

from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_longest, plan_step
from mft_megatron.mcore.adapters.quantized_linear import hold_shapes
from mft_megatron.mcore.optim.guarded_step import accept
from mft_megatron.mcore.optim.held_tensors import held_tensors
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform.simulation import listener
from mft_megatron.mcore.platform.simulation.device_mode import running
from mft_megatron.mcore.platform.simulation.expert_load import ExpertLoad
from mft_megatron.mcore.platform.simulation.process_group import start
from mft_megatron.mcore.trainer import Trainer

from .measured_steps import rows_of_peak
from .other_peaks import evaluation_memory, save_memory
from .rank_report import GRADIENTS, OPTIMIZER, WEIGHTS, Memory, RankReport, Step
from .step_counters import StepCounters

STEPS = 2
# what is answered where these functions read a value of a tensor: no gradient has overflowed
ANSWERS = {"any_rank": 0.0, "_unscale_main_grads_and_check_for_nan": 0.0}


def run_rank(
    arguments: Arguments,
    dataset: PackedDataset,
    rank: int,
    vocab_size: int | None = None,
    busiest_expert: float = 1.0,
    micro_batches: int | None = None,
) -> RankReport:
    """Take two training steps as one rank of the layout of ``arguments``, and report what they need.

    The process simulates a GPU (:func:`mft_megatron.mcore.platform.devices.simulate`) and can be one rank only.

    Args:
        arguments: complete and checked, of ``arguments.world_size`` ranks.
        dataset: packed for ``--seq-length``.
        rank: which of the world.
        vocab_size: rows of the model's vocabulary; ``None`` for those of the data set.
        busiest_expert: load of the busiest expert of each layer, one of this rank's, in multiples of the mean.
        micro_batches: of a step of this rank, where ``arguments`` have fewer than the run.

    Raises:
        InputError: something in ``arguments`` cannot be simulated.
    """
    began = time.perf_counter()
    start(rank, arguments.world_size)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        position = process_groups.position()
        with running(ANSWERS, _load(arguments, position["expert"], busiest_expert)):
            counters = StepCounters(group_name)
            listener.listen(counters)
            trainer = Trainer(arguments, vocab_size or dataset.vocab_size, len(dataset.tasks))
            frozen = [layer for chunk in trainer.chunks for layer in hold_shapes(chunk.module)]
            for layer in frozen:
                counters.memory.drop(layer.weight)
            steps = _steps(arguments, dataset, trainer, counters, micro_batches)
            longest = _longest(arguments, dataset, trainer, counters) if dataset.padded else None
            _mark(counters, trainer)
            resident = dict(counters.memory.by_category)
            evaluation = evaluation_memory(arguments, dataset, trainer, counters)
            save, save_host = save_memory(arguments, trainer, counters)
            listener.listen(None)
            models = [chunk.module for chunk in trainer.chunks]
            weights = [weight for model in models for weight in model.parameters()]
    return RankReport(
        rank=rank,
        position=position,
        layers=tuple(layer.layer_number for model in models for layer in model.decoder.layers),
        embedding=any(model.pre_process for model in models),
        output=any(model.post_process for model in models),
        parameters=sum(weight.numel() for weight in (*weights, *(layer.weight for layer in frozen))),
        trained_parameters=sum(weight.numel() for weight in weights if weight.requires_grad),
        resident=resident,
        steps=steps,
        longest=longest,
        evaluation=evaluation,
        save=save,
        save_host=save_host,
        seconds=time.perf_counter() - began,
    )


def _load(arguments: Arguments, expert_rank: int, busiest: float) -> ExpertLoad | None:
    """The load of experts: the busiest one is the first of this rank."""
    experts = arguments.network.num_experts
    if experts is None:
        return None
    of_rank = experts // arguments.distributed.expert_model_parallel_size
    return ExpertLoad(experts, arguments.network.moe_router_topk, busiest, expert_rank * of_rank)


def _steps(
    arguments: Arguments,
    dataset: PackedDataset,
    trainer: Trainer,
    counters: StepCounters,
    micro_batches: int | None,
) -> tuple[Step, ...]:
    """Take the first steps of a run."""
    split, steps, consumed = dataset.split("train"), [], 0
    for number in range(1, STEPS + 1):
        _mark(counters, trainer)
        counters.reset()
        plan = plan_step(
            split,
            seed=arguments.initialization.seed,
            global_batch_size=arguments.batch_sizes.after(consumed),
            consumed_samples=consumed,
            order_version=dataset.entry.order_version,
        )
        # a run asks in each step whether a rank got a signal
        trainer.leave_requested = lambda: False
        report = trainer.train_step(split, plan, np.ones(len(dataset.tasks)), accept)
        if report is not None:
            report.leave_requested()
        consumed += plan.num_packs
        computed = plan.num_packs // arguments.training.micro_batch_size // trainer.ranks.data_size
        counters.times = Fraction(micro_batches or computed, computed)
        steps.append(
            Step(
                number,
                micro_batches or computed,
                computed,
                counters.memory.at_peak(),
                counters.waits(),
                counters.copies(),
                counters.messages(),
                counters.operations,
                counters.kernels,
            )
        )
    return tuple(steps)


def _longest(arguments: Arguments, dataset: PackedDataset, trainer: Trainer, counters: StepCounters) -> Memory:
    """Take a step of the longest rows."""
    rows = min(arguments.training.global_batch_size, rows_of_peak(arguments))
    split = dataset.split("train")
    counters.reset()
    trainer.train_step(split, plan_longest(split, rows), np.ones(len(dataset.tasks)), accept)
    return counters.memory.at_peak()


def group_name(group: dist.ProcessGroup) -> str:
    """Name of a process group from Megatron-Core's description: ``tensor``, ``data with cp``, …; ``world`` for all."""
    if group.group_desc == "default_pg":
        return "world"
    words = group.group_desc.lower().removesuffix("_group").split("_")
    name = " ".join(word for word in words if word not in ("model", "parallel", "group"))
    return f"{name} expert" if name.endswith(" and") else name or "tensor and pipeline"


def _mark(counters: StepCounters, trainer: Trainer) -> None:
    tensors = held_tensors(trainer.chunks, trainer.optimizer)
    counters.memory.mark(tensors.optimizer, OPTIMIZER)
    counters.memory.mark(tensors.gradients, GRADIENTS)
    counters.memory.mark(tensors.weights, WEIGHTS)

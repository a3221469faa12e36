"""Memory at the peaks of an evaluation and of a save, between steps."""

import numpy as np

from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.mcore.checkpointing.held_by_save import build_state, share_that_is_written
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.training.evaluation import evaluation_plans

from .memory_account import MemoryAccount, allocated
from .rank_report import Memory
from .step_counters import StepCounters


def evaluation_memory(
    arguments: Arguments, dataset: PackedDataset, trainer: Trainer, counters: StepCounters
) -> Memory | None:
    """Evaluate one batch; ``None`` where the run evaluates nothing."""
    if "valid" not in dataset.splits or arguments.validation.eval_iters == 0:
        return None
    split = dataset.split("valid")
    counters.reset()
    counters.memory.keeps_activations = False
    trainer.evaluate(split, list(evaluation_plans(arguments, split, 1)), np.ones(len(dataset.tasks)))
    counters.memory.keeps_activations = True
    return counters.memory.at_peak()


def save_memory(arguments: Arguments, trainer: Trainer, counters: StepCounters) -> tuple[Memory | None, int | None]:
    """Build what a save writes.

    Returns:
        memory of the GPU at the peak, and bytes on the host with what this rank copies there to write it; both
        ``None`` where the run saves nothing.
    """
    if arguments.checkpoint.save is None:
        return None, None
    counters.reset()
    host = counters.host = MemoryAccount()
    tensors = build_state(arguments, trainer)
    memory = counters.memory.at_peak()
    host_now, counters.host = host.now, None
    storages = {id(tensor.untyped_storage()): tensor for tensor in tensors}
    on_gpu = sum(allocated(tensor.untyped_storage()) for key, tensor in storages.items() if not host.holds(key))
    return memory, max(host.at_peak().peak, host_now + int(on_gpu * share_that_is_written(arguments)))

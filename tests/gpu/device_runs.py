"""Short runs of the trainer, in the process of a device; see :mod:`.device_worker`."""

import functools
from pathlib import Path

from tests.gpu import device_worker


def on(device, function, *arguments):
    """Call one of this file's functions in the process of ``cpu`` or ``cuda``."""
    return device_worker.on(device, f"tests.gpu.device_runs:{function}", *arguments)


@functools.cache
def on_cpu(function, *arguments):
    """Call one of this file's functions on the CPU, once for all tests that compare with it."""
    return on("cpu", function, *arguments)


def _trainer(prefix, options):
    from mft_megatron.mcore.trainer import Trainer
    from tests.parallel.run import arguments_for, open_dataset

    arguments = arguments_for(prefix, options, 1)
    dataset = open_dataset(arguments)
    return Trainer(arguments, dataset.vocab_size, 4), dataset.split("train"), arguments


def _groups(prefix, options):
    from mft_megatron.mcore.parallel import process_groups
    from tests.parallel.run import arguments_for

    arguments = arguments_for(prefix, options, 1)
    return process_groups.process_groups(arguments.distributed, arguments.initialization.seed)


def _step(trainer, split, index):
    from mft_megatron.data.loading.step_plan import plan_step
    from tests.parallel.run import TASK_WEIGHTS

    size = trainer.arguments.training.global_batch_size
    plan = plan_step(split, seed=1, global_batch_size=size, consumed_samples=size * index)
    report = trainer.train_step(split, plan, TASK_WEIGHTS)
    return [report.loss, float(report.grad_norm)]


def train(prefix, options, steps=2):
    """Train some steps.

    Returns:
        ``curve``: loss and gradient norm of each step. ``kernel``: name of the attention kernel. ``allocated``: peak
        bytes that torch had allocated in each step; 0 on a CPU.
    """
    import torch

    with _groups(prefix, options):
        trainer, split, _ = _trainer(prefix, options)
        curve, allocated = [], []
        for index in range(steps):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            curve.append(_step(trainer, split, index))
            allocated.append(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
        kernel = trainer.chunks[0].module.decoder.layers[0].self_attention.core_attention.kernel
        return {"curve": curve, "allocated": allocated, "kernel": getattr(kernel, "__name__", type(kernel).__name__)}


def waits(prefix, options):
    """Waits of the host in the third step of a run, as torch sees them: one message each."""
    import warnings

    import torch

    from mft_megatron.data.loading.step_plan import plan_step
    from tests.parallel.run import TASK_WEIGHTS

    with _groups(prefix, options):
        trainer, split, arguments = _trainer(prefix, options)
        for index in range(2):
            _step(trainer, split, index)
        size = arguments.training.global_batch_size
        plan = plan_step(split, seed=1, global_batch_size=size, consumed_samples=2 * size)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.train_step(split, plan, TASK_WEIGHTS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(one.message) for one in caught if "synchronizing" in str(one.message)]


def _info():
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.run_folder.description import CheckpointInfo

    return CheckpointInfo(2, 16, {}, 1, {}, "", 1, 8, layout=process_groups.parallel_layout())


def save(prefix, options, folder):
    """Train two steps, save, and train a third; returns ``path`` of the checkpoint and ``third``, the third step."""
    from mft_megatron.mcore.checkpointing import checkpoint

    with _groups(prefix, options):
        trainer, split, arguments = _trainer(prefix, options)
        for index in range(2):
            _step(trainer, split, index)
        path = checkpoint.save(Path(folder), trainer, _info(), arguments.checkpoint)
        return {"path": str(path), "third": _step(trainer, split, 2)}


def load(prefix, options, path):
    """Load a checkpoint of two steps and train the third, ``third``."""
    from mft_megatron.mcore.checkpointing import checkpoint

    with _groups(prefix, options):
        trainer, split, arguments = _trainer(prefix, options)
        checkpoint.load(Path(path), trainer, _info(), arguments.checkpoint)
        return {"third": _step(trainer, split, 2)}


def collectives():
    """Run the collectives of one rank; ``backend``: of its process group."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups

    with process_groups.process_groups(DistributedArguments(), seed=1):
        return {
            "backend": dist.get_backend(),
            "sum": process_groups.sum_over_data(np.arange(3)).tolist(),
            "any": [process_groups.any_rank(True), process_groups.any_rank(False)],
            "main": process_groups.broadcast_from_main(torch.arange(3)).tolist(),
        }


def curves(prefix, options, steps=2):
    """Loss and gradient norm of each step on the GPU, and on the CPU."""
    return on("cuda", "train", prefix, options, steps)["curve"], on_cpu("train", prefix, options, steps)["curve"]


def worst(ours, theirs):
    """Largest relative difference of two lists of numbers with the same nesting."""
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        return max(map(worst, ours, theirs))
    return abs(ours - theirs) / max(abs(theirs), 1e-30)

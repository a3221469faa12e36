"""Short runs of the trainer on a chosen device, each in a separate process.

A process has one device from its start on, so a test that compares GPU and CPU starts a process for each; the one for
the CPU sees no GPU: ``on("cpu", "train", …)``. This file is also the program of these processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ANSWER = "ANSWER "  # starts the line of output that holds the result


def on(device, function, *arguments, program=__file__):
    """Call a function in a process on ``cpu`` or ``cuda`` and return its result.

    Args:
        device: ``cpu`` or ``cuda``.
        function: its name in ``program``.
        arguments: of the function; JSON values, like its result.
        program: path of the file, which calls :func:`answer`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-W", "ignore", program, function, json.dumps(arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    answers = [line for line in process.stdout.splitlines() if line.startswith(ANSWER)]
    content = json.loads(answers[0].removeprefix(ANSWER))
    assert content["device"] == device
    return content["result"]


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


def _info():
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.run_folder import CheckpointInfo

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


def worst(ours, theirs):
    """Largest relative difference of two lists of numbers with the same nesting."""
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        return max(map(worst, ours, theirs))
    return abs(ours - theirs) / max(abs(theirs), 1e-30)


def answer(functions):
    """Call the function that :func:`on` has named on the command line, and print its result."""
    result = functions[sys.argv[1]](*json.loads(sys.argv[2]))
    from mft_megatron.mcore.platform import devices

    print(ANSWER + json.dumps({"result": result, "device": devices.device().type}))


if __name__ == "__main__":
    answer(globals())

"""The memory that a dry run reports against what torch allocates on the GPU, in the second step of a run."""

import json

import pytest

from tests.gpu import device_worker
from tests.ranks import run_tool

MODEL = (
    "--dry-run --mock-data lognormal:600:0.8 --seq-length 4096 --micro-batch-size 1 --global-batch-size 4 --bf16 "
    "--num-layers 6 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16 --group-query-attention "
    "--num-query-groups 4 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --use-distributed-optimizer"
)
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SHAPES = {
    "full parameters": "--vocab-size 32000",
    "recomputed, large vocabulary": f"--vocab-size 152064 --micro-batch-size 2 {RECOMPUTE}",
    "padded, logits held": "--vocab-size 32000 --mock-padding-mode padding --cross-entropy-impl megatron",
}


def peaks(words):
    """Train two steps as the dry run does; peak bytes that torch allocates in each, 0 on a CPU."""
    import numpy as np
    import torch

    from mft_megatron.arguments.command import read_command_line
    from mft_megatron.arguments.groups.dry_run import DRY_RUN
    from mft_megatron.data.loading.step_plan import plan_step
    from mft_megatron.dry_run.start import started
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    with started(read_command_line(words, more=DRY_RUN)) as start:
        arguments, split = start.arguments, start.dataset.split("train")
        with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
            trainer = Trainer(arguments, start.dataset.vocab_size, len(start.dataset.tasks))
            size, found = arguments.training.global_batch_size, []
            for number in range(2):
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                plan = plan_step(split, seed=1, global_batch_size=size, consumed_samples=size * number)
                trainer.train_step(split, plan, np.ones(len(start.dataset.tasks)))
                found.append(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
            return found


@pytest.mark.parametrize("shape", SHAPES)
def test_dry_run(shape, within):
    import torch

    words = [*MODEL.split(), *SHAPES[shape].split()]
    gpu = "h100-80g" if torch.cuda.get_device_capability() >= (9, 0) else "a100-80g"
    process = run_tool("pretrain_mft.py", *words, "--gpu", gpu, "--json")
    assert process.returncode == 0, process.stdout + process.stderr
    (rank,) = json.loads(process.stdout)["ranks"]
    reported = rank["steps"][1]["memory"]["peak"]
    measured = device_worker.on("cuda", "tests.gpu.test_cuda_memory:peaks", words)[1]
    within(abs(reported / measured - 1), 0.1)

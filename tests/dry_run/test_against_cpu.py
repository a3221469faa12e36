"""Bytes that a dry run reports, compared with those of the same tensors in a real run on the CPU."""

import os

import numpy as np
import pytest

from mft_megatron.dry_run.rank_report import GRADIENTS, OPTIMIZER, WEIGHTS
from tests.dry_run.simulated import LENGTH, arguments_of
from tests.made_dataset import write_dataset
from tests.parallel.layouts import SHAPES
from tests.ranks import run_on_ranks

ROUNDING = 512  # of torch's allocator on a GPU
RUN = (
    "--micro-batch-size 1 --global-batch-size 8 --hidden-dropout 0 --attention-dropout 0 --train-iters 2 --lr 1e-3 "
    f"--make-vocab-size-divisible-by 64 --seq-length {LENGTH}"
)
# options, number of ranks, and the rank that is compared
CASES = {
    "fp32": (SHAPES["llama"], 1, 0),
    "tied, SGD": (SHAPES["tied"] + " --bf16 --optimizer sgd", 1, 0),
    "Megatron's defaults, fp16": (SHAPES["Megatron's defaults"] + " --fp16 --initial-loss-scale 8", 1, 0),
    "bf16, TP2 DP2 distributed optimizer": (
        SHAPES["llama"] + " --bf16 --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
        4,
        3,
    ),
    "fp32, PP2 VPP2, first stage": (
        SHAPES["llama"] + " --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        2,
        0,
    ),
    "bf16, PP2 DP2 overlap, last stage": (
        SHAPES["llama"] + " --bf16 --pipeline-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather --ddp-bucket-size 30001",
        4,
        2,
    ),
    "LoRA": (SHAPES["llama"] + " --bf16 --peft-type lora --lora-rank 4", 1, 0),
    "experts, EP2": (
        SHAPES["experts"] + " --bf16 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
        2,
        1,
    ),
}
# what each adds to the others is small, so it runs with the slow tests
SELDOM = ("tied, SGD", "Megatron's defaults, fp16", "bf16, PP2 DP2 overlap, last stage")


def held(words, rank):
    """Bytes of weights, gradients and optimizer states of this rank after a step; ``None`` on other ranks."""
    import torch

    from mft_megatron.data.loading.dataset import PackedDataset
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.training.loop import next_plan
    from mft_megatron.training.progress import Progress

    arguments = arguments_of(words.split(), int(os.environ["WORLD_SIZE"]))
    dataset = PackedDataset.open(arguments.data.data_path, arguments.data.seq_length)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer = Trainer(arguments, dataset.vocab_size, len(dataset.tasks))
        plan = next_plan(dataset, arguments, Progress())
        trainer.train_step(dataset.split("train"), plan, np.ones(len(dataset.tasks)))
        if torch.distributed.get_rank() != rank:
            return None
        models = [chunk.module for chunk in trainer.chunks]
        parameters = [weight for model in models for weight in model.parameters()]
        tensors = {
            WEIGHTS: [*parameters, *(buffer for model in models for buffer in model.buffers())],
            GRADIENTS: [weight.main_grad for weight in parameters if getattr(weight, "main_grad", None) is not None],
            OPTIMIZER: [],
        }
        for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
            for group in part.optimizer.param_groups:
                tensors[OPTIMIZER] += group["params"]
            for state in part.optimizer.state.values():
                tensors[OPTIMIZER] += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return bytes_of(tensors)


def bytes_of(tensors):
    """Bytes by category; a storage counts where it comes first."""
    seen, sizes = set(), {}
    for category, of_category in tensors.items():
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in of_category}
        sizes[category] = sum(-(-size // ROUNDING) * ROUNDING for key, size in storages.items() if key not in seen)
        seen |= storages.keys()
    return sizes


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "data"
    write_dataset(prefix, LENGTH)
    return prefix


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in CASES]
)
def test_weights_gradients_and_states_have_the_bytes_of_a_real_run(name, simulation, prefix):
    words, world_size, rank = CASES[name]
    (real,) = filter(None, run_on_ranks(world_size, held, f"{words} {RUN} --data-path {prefix}", rank))
    resident = simulation.report(words, world_size, rank, model=RUN).resident
    assert {category: resident[category] for category in real} == real

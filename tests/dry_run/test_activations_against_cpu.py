"""Activations that a dry run reports, compared with what a real forward pass on the CPU keeps for its backward pass."""

import os

import numpy as np
import pytest

from mft_megatron.dry_run.rank_report import ACTIVATIONS, LOGITS
from tests.dry_run.simulated import LENGTH, arguments_of
from tests.made_dataset import write_dataset
from tests.ranks import run_on_ranks

# with kernels that are the same on the CPU and on a GPU, or keep the same
RUN = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --micro-batch-size 2 --global-batch-size 8 "
    f"--hidden-dropout 0 --attention-dropout 0 --train-iters 2 --lr 1e-3 --seq-length {LENGTH} "
    "--attention-backend local --no-bias-swiglu-fusion"
)
TP = "--tensor-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-num-layers"
# Options, ranks, and what a token keeps on the CPU alone: there values are a view of queries, keys and values together,
# on a GPU a copy. Columns of queries and keys of a rank, in all layers whose attention is not recomputed.
CASES = {
    "fp32": ("", 1, 4 * 128),
    "bf16, grouped queries": ("--bf16 --group-query-attention --num-query-groups 2", 1, 4 * 96),
    "logits": ("--bf16 --cross-entropy-impl megatron", 1, 4 * 128),
    "TP": (f"--bf16 {TP}", 2, 4 * 64),
    "TP and sequence parallelism": (f"--bf16 {TP} --sequence-parallel", 2, 4 * 64),
    "selective": ("--bf16 --recompute-granularity selective --recompute-modules core_attn layernorm mlp", 1, 0),
    "uniform": (f"--bf16 {FULL} 2 --recompute-method uniform", 1, 0),
    "block": (f"--bf16 {FULL} 2 --recompute-method block", 1, 2 * 128),
    "LoRA": ("--bf16 --peft-type lora --lora-rank 4", 1, 4 * 128),
}


class Stopped(Exception):  # noqa: N818
    """The forward pass is over."""


def forward(words, world_size, around):
    """Run the first forward pass of a trainer; ``around(model, run)`` calls ``run()`` and has the result."""
    from mft_megatron.data.loading.dataset import PackedDataset
    from mft_megatron.data.loading.step_plan import plan_step
    from mft_megatron.mcore.trainer import Trainer

    arguments = arguments_of(words, world_size)
    dataset = PackedDataset.open(arguments.data.data_path, arguments.data.seq_length)
    trainer = Trainer(arguments, dataset.vocab_size, len(dataset.tasks))
    model = trainer.chunks[0].module
    original, found = model.forward, []

    def stopping(*positional, **named):
        found.append(around(model, lambda: original(*positional, **named)))
        raise Stopped

    model.forward = stopping
    plan = plan_step(dataset.split("train"), seed=1, global_batch_size=8, consumed_samples=0)
    with pytest.raises(Stopped):
        trainer.train_step(dataset.split("train"), plan, np.ones(len(dataset.tasks)))
    return found[0]


def kept(words):
    """Bytes of what a real forward pass keeps beside weights, each storage rounded as on a GPU."""
    import torch

    from mft_megatron.dry_run.memory_account import allocated
    from mft_megatron.mcore.parallel import process_groups

    def around(model, run):
        weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return sum(allocated(storage) for pointer, storage in saved.items() if pointer not in weights)

    world_size = int(os.environ["WORLD_SIZE"])
    with process_groups.process_groups(arguments_of(words.split(), world_size).distributed, 1):
        return forward(words.split(), world_size, around)


def accounted(words, world_size, rank):
    """Bytes in the account after a forward pass, by category."""
    from mft_megatron.dry_run.rank_run import ANSWERS, group_name
    from mft_megatron.dry_run.step_counters import StepCounters
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.platform.simulation import listener
    from mft_megatron.mcore.platform.simulation.device_mode import running
    from mft_megatron.mcore.platform.simulation.process_group import start

    def around(model, run):
        output = run()
        return dict(counters.memory.by_category) if output is not None else {}

    start(rank, world_size)
    with process_groups.process_groups(arguments_of(words, world_size).distributed, 1), running(ANSWERS):
        counters = StepCounters(group_name)
        listener.listen(counters)
        return forward(words, world_size, around)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "data"
    write_dataset(prefix, LENGTH)
    return prefix


@pytest.mark.parametrize("name", CASES)
def test_a_forward_pass_keeps_what_a_real_one_keeps(name, simulation, prefix):
    words, world_size, columns = CASES[name]
    real = run_on_ranks(world_size, kept, f"{RUN} {words} --data-path {prefix}")[0]
    real -= columns * 2 * LENGTH * (2 if "bf16" in words else 4)
    sizes = simulation.report(words, world_size, model=RUN, function=accounted)
    assert sizes[ACTIVATIONS] + (sizes[LOGITS] if name == "logits" else 0) == pytest.approx(real, rel=0.015)

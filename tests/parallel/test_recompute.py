"""Recomputed activations give the same results, bit for bit, as kept ones, with dropout and on any parallel layout."""

import pytest

from tests.ranks import run_on_ranks

FULL = "--recompute-granularity full --recompute-method"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
ANYWHERE = {
    "uniform 1": f"{FULL} uniform --recompute-num-layers 1",
    "uniform 2": f"{FULL} uniform --recompute-num-layers 2",
    "block": f"{FULL} block --recompute-num-layers 1",
    "core_attn": "--recompute-activations",
    "layernorm": f"{SELECTIVE} layernorm",
    "mlp": f"{SELECTIVE} mlp",
    "all": f"{SELECTIVE} core_attn layernorm mlp",
}
DISTRIBUTED = {
    "distributed uniform": f"{FULL} uniform --recompute-num-layers 1 --distribute-saved-activations",
    "distributed block": f"{FULL} block --recompute-num-layers 1 --distribute-saved-activations",
}
EXPERTS = {
    "moe": f"{SELECTIVE} moe",
    "shared_experts": f"{SELECTIVE} shared_experts layernorm",
}
# modules that are run more often than without recompute
WHOLE = {"layer", "attention", "mlp", "norm"}
AGAIN = {
    **dict.fromkeys(("uniform 1", "uniform 2", "block"), WHOLE),
    **{name: {*WHOLE, "shared"} for name in DISTRIBUTED},
    "core_attn": {"attention"},
    "layernorm": {"norm"},
    "mlp": {"mlp"},
    "all": {"attention", "norm", "mlp"},
    "moe": {"mlp"},
    "shared_experts": {"mlp", "norm"},
}
SMALL = "--global-batch-size 4 --hidden-size 32 --num-attention-heads 4"
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1"


def steps_of(prefix, layout, world_size, variants, shape="llama"):
    """Train each variant; return losses and gradient norms, gradients, calls of modules, and random numbers."""
    import numpy as np
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from mft_megatron.mcore.attention.packed_attention import PackedAttention
    from mft_megatron.mcore.model.norm import LayerNorm, RMSNorm
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from tests.parallel.run import arguments_for, open_dataset, plans_of

    def count(owner, method, name):
        original = getattr(owner, method)
        calls[name] = 0

        def counted(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        setattr(owner, method, counted)
        return owner, method, original

    results, calls = {}, {}
    counters = [
        count(TransformerLayer, "forward", "layer"),
        count(PackedAttention, "forward", "attention"),
        count(MLP, "forward", "mlp"),
        count(RMSNorm, "forward", "norm"),
        count(LayerNorm, "forward", "norm"),
        count(tensor_parallel.random, "split_tensor_into_1d_equal_chunks", "shared"),
    ]
    arguments = arguments_for(prefix, layout, world_size, shape)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        for name, extra in variants.items():
            torch.manual_seed(5)
            tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)
            arguments = arguments_for(prefix, f"{layout} {SMALL} {extra}", world_size, shape)
            trainer = Trainer(arguments, dataset.vocab_size, 4)
            calls.update(dict.fromkeys(calls, 0))
            curve = []
            for plan in plans_of(split, 1, 2):
                report = trainer.train_step(split, plan, np.ones(4))
                curve.append((report.loss, report.grad_norm))
            gradients = [weight.main_grad.clone() for chunk in trainer.chunks for weight in chunk.parameters()]
            random = torch.rand(3), torch.rand(3)
            results[name] = curve, gradients, dict(calls), random
    for owner, method, original in counters:
        setattr(owner, method, original)
    return results


def compare(results):
    """Compare every variant with the one that keeps all activations, on all ranks."""
    import torch

    for result in results:
        curve, gradients, calls, random = result.pop("kept")
        assert any(gradient.count_nonzero() for gradient in gradients)
        for name, (again, its_gradients, its_calls, its_random) in result.items():
            assert again == curve, name
            assert all(map(torch.equal, gradients, its_gradients)), name
            assert all(map(torch.equal, random, its_random)), name
            assert {kind for kind in calls if its_calls[kind] > calls[kind]} == AGAIN[name], name


def chosen(*names):
    return {"kept": "", **{name: {**ANYWHERE, **DISTRIBUTED, **EXPERTS}[name] for name in names}}


ALONE = {
    "dropout": ("llama", DROPOUT, ANYWHERE),
    "logits": ("llama", "--cross-entropy-impl megatron", ("uniform 1", "all")),
    "Megatron's defaults": ("Megatron's defaults", "--qk-layernorm", ("uniform 1", "layernorm")),
    "experts": ("shared experts", DROPOUT, ("uniform 1", *EXPERTS)),
}


@pytest.mark.parametrize("name", ALONE)
def test_one_process(dataset_prefix, name):
    shape, layout, variants = ALONE[name]
    compare([steps_of(dataset_prefix, layout, 1, chosen(*variants), shape)])


LAYOUTS = {
    "TP2": ("--tensor-model-parallel-size 2", ("core_attn", "all", *DISTRIBUTED)),
    "TP2 SP": ("--tensor-model-parallel-size 2 --sequence-parallel", ("uniform 2", "block", "all")),
    "PP2": ("--pipeline-model-parallel-size 2", ("uniform 1", "uniform 2", "all")),
    "PP2 VPP2": (
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        ("uniform 1", "block", "all"),
    ),
    "CP2": ("--context-parallel-size 2 --micro-batch-size 2", ("uniform 1", "all")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(dataset_prefix, name):
    layout, variants = LAYOUTS[name]
    compare(run_on_ranks(2, steps_of, dataset_prefix, f"{layout} {DROPOUT}", 2, chosen(*variants)))

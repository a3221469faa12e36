"""Experts: a step of a small model against plain PyTorch in fp64, and the router alone."""

import types

import numpy as np
import pytest
import torch

from mft_megatron.batch import Batch
from tests.made_dataset import batch_of_packs
from tests.moe_reference import gradients, router_loss
from tests.ranks import run_on_ranks

SMALL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear --ffn-hidden-size 96 "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 1 "
    "--seq-length 128 --train-iters 1 --lr 1e-3 --global-batch-size 4 --mft-loss token --clip-grad 1e9 "
    "--num-experts 4 --moe-ffn-hidden-size 48 --init-method-std 0.1 "
)
LOSSES = {"seq_aux_loss": 0.3, "z_loss": 0.2}
PACK_LOSSES = "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.3 --moe-z-loss-coeff 0.2"


def _step(prefix, extra, world, scale=None):
    """Run one step on this rank: its micro-batches, weights before the step, gradients and report."""
    from megatron.core.optimizer import FP32Optimizer

    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.data.loading.dataset import PackedDataset
    from mft_megatron.data.loading.step_plan import plan_step, shard_plan
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    if scale is not None:
        FP32Optimizer.get_loss_scale = lambda self: torch.tensor([scale])
    arguments = parse_arguments(f"{SMALL} --data-path {prefix} {extra}".split(), world)
    dataset = PackedDataset.open(prefix, 128)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, len(dataset.tasks))
        (model,) = (chunk.module for chunk in trainer.chunks)
        first = model.config.num_moe_experts // arguments.distributed.expert_model_parallel_size
        first *= process_groups.parallel_state.get_expert_model_parallel_rank()
        weights = {_global(name, first): weight.detach().cpu().clone() for name, weight in model.named_parameters()}
        plans = (plan_step(split, seed=seed, global_batch_size=4, consumed_samples=0) for seed in range(500))
        plan = next(plan for plan in plans if (batch_of_packs(split, plan.packs_G).lengths_B < 128).any())
        indices = shard_plan(plan, process_groups.ranks(), arguments.training.micro_batch_size, False)
        micro_batches = [batch_of_packs(split, packs_B) for packs_B in plan.packs_G[indices]]
        report = trainer.train_step(split, plan, np.ones(len(dataset.tasks)))
        return types.SimpleNamespace(
            network=arguments.network,
            micro_batches=micro_batches,
            weights=weights,
            gradients={
                _global(name, first): weight.main_grad.cpu().clone() for name, weight in model.named_parameters()
            },
            loss=report.loss,
            grad_norm=report.grad_norm,
            losses={name: values.cpu() for name, values in report.expert_losses.items()},
        )


def _global(name, first):
    """A weight's name with the expert's index in the whole model; ``first``: index of this rank's first expert."""
    before, experts, after = name.partition("local_experts.")
    if not experts:
        return name
    index, _, rest = after.partition(".")
    return f"{before}{experts}{first + int(index)}.{rest}"


EP2 = "--expert-model-parallel-size 2"
KINDS = {
    "packs of one micro-batch": (1, "--micro-batch-size 4", PACK_LOSSES, LOSSES, 1),
    "two micro-batches": (1, "--micro-batch-size 2 --cross-entropy-impl megatron", PACK_LOSSES, LOSSES, 1),
    "two data-parallel ranks": (2, "--micro-batch-size 1", PACK_LOSSES, LOSSES, 1),
    "experts on two ranks": (2, f"--micro-batch-size 2 {EP2}", PACK_LOSSES, LOSSES, 1),
    "experts on two ranks, alltoall": (
        2,
        f"--micro-batch-size 1 {EP2} --moe-token-dispatcher-type alltoall",
        PACK_LOSSES,
        LOSSES,
        1,
    ),
    "a loss scale": (1, "--micro-batch-size 2", PACK_LOSSES, LOSSES, 1024),
    "balance of micro-batches": (2, "--micro-batch-size 2", "--moe-aux-loss-coeff 0.3", {"aux_loss": 0.3}, 1),
    "balance of steps": (
        2,
        "--micro-batch-size 2",
        "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.3",
        {"global_aux_loss": 0.3},
        1,
    ),
    "both": (
        1,
        "--micro-batch-size 2",
        "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.3 0.1",
        {"aux_loss": 0.3, "seq_aux_loss": 0.1},
        1,
    ),
    "sigmoid, a dense layer, shared experts": (
        1,
        "--micro-batch-size 2",
        f"{PACK_LOSSES} --moe-router-score-function sigmoid --moe-layer-freq [0,1] --moe-shared-expert-gate "
        "--moe-shared-expert-intermediate-size 32",
        LOSSES,
        1,
    ),
}
LOGGED = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
    "z_loss": "z_loss",
}


QUICK = (
    "two micro-batches",
    "experts on two ranks, alltoall",
    "a loss scale",
    "balance of steps",
    "sigmoid, a dense layer, shared experts",
)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_a_step_equals_the_reference(dataset_prefix, kind):
    """Objective, router losses and the gradient of every weight: each loss is scaled once, padding is in none."""
    world, layout, options, coefficients, scale = KINDS[kind]
    ranks = run_on_ranks(world, _step, dataset_prefix, f"{options} {layout}", world, scale if scale > 1 else None)
    batches = [batch for rank in ranks for batch in rank.micro_batches]
    assert any((batch.lengths_B < 128).any() for batch in batches), "nothing is padded"
    score = ranks[0].network.moe_router_score_function
    if "global_aux_loss" in coefficients:
        # the step is one micro-batch of each rank
        batches = [_concatenated(batches)]
    weights = {name: weight for rank in ranks for name, weight in rank.weights.items()}
    expected, by_layer, expected_gradients = gradients(weights, batches, ranks[0].network, coefficients, score)
    without = expected - sum(factor * by_layer[name].sum().item() for name, factor in coefficients.items())
    for rank in ranks:
        assert rank.loss == pytest.approx(without, rel=1e-6)
        for name, values in by_layer.items():
            logged = rank.losses[LOGGED[name]]
            dense = torch.tensor([not has for has in rank.network.expert_layers])
            assert torch.equal(logged.isnan(), dense)
            assert logged[~dense].tolist() == pytest.approx(values[~dense].tolist(), rel=1e-5), name
        for name, gradient in rank.gradients.items():
            expected_gradient = expected_gradients[name] * scale
            difference = (gradient - expected_gradient).norm() / expected_gradient.norm()
            assert difference < 2e-5, f"{name}: {difference:.1e}"
    norm = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm().item()
    assert ranks[0].grad_norm == pytest.approx(norm * scale, rel=1e-5)


def _concatenated(batches):
    """Concatenate micro-batches; their samples get new indices."""
    first, *others = batches
    for other in others:
        columns = {
            name: np.concatenate([getattr(first, name), getattr(other, name)])
            for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS", "task_ids_BS", "lengths_B")
        }
        sample_ids = np.concatenate([first.sample_ids_BS, other.sample_ids_BS + first.sample_ids_BS.max() + 1])
        first = Batch(**columns, sample_ids_BS=sample_ids, cu_seqlens=None, max_seqlen=0)
    return first


# the router alone


class _OneRank:
    def size(self):
        return 1

    def rank(self):
        return 0


def build_router(extra="", training=True):
    """A router of one rank with random weights."""
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.model.config import transformer_config
    from mft_megatron.mcore.moe.router import PackedRouter

    config = transformer_config(parse_arguments(f"{SMALL} --data-path x --micro-batch-size 1 {extra}".split(), 1))
    groups = types.SimpleNamespace(**dict.fromkeys(("tp", "cp", "tp_cp", "tp_dp_cp"), _OneRank()))
    router = PackedRouter(config, groups).train(training).to("cpu")
    torch.nn.init.normal_(router.weight)
    router.begin_step(1.0)
    return router


def stream(lengths=(10, 7), width=12, experts=4, seed=0):
    """Logits [T, 1, experts] and rows [T, B] of padded rows, and a mask [T] of the real tokens."""
    logits = torch.randn(len(lengths) * width, 1, experts, generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor(lengths)
    rows = torch.zeros(len(logits), len(lengths), dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        rows[row * width : row * width + length, row] = True
    return logits, rows, rows.any(1)


def attached_gradient(router, logits, rows):
    """Gradient [T, experts] of the router's losses with respect to the logits."""
    logits = logits.clone().requires_grad_()
    probabilities, _ = router.routing(logits, rows)
    return torch.autograd.grad(probabilities.sum() * 0, logits)[0].squeeze(1)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_padding_is_in_no_loss(kind):
    router = build_router(f"--moe-router-load-balancing-type {kind} --moe-aux-loss-coeff 0.3 --moe-z-loss-coeff 0.2")
    logits, rows, real = stream()
    before = attached_gradient(router, logits, rows)
    losses = dict(router.losses)
    assert not before[~real].any()
    assert before[real].any(1).all()
    router.begin_step(1.0)
    assert torch.equal(attached_gradient(router, logits.masked_fill(~real[:, None, None], 50.0), rows), before)
    assert router.losses == losses
    indices = [np.flatnonzero(rows[:, row]).tolist() for row in range(2)]
    for name, value in ((kind, losses[LOGGED[kind]]), ("z_loss", losses["z_loss"])):
        assert value.item() == pytest.approx(router_loss(name, logits.squeeze(1).double(), indices, 2).item(), rel=1e-5)


def test_rows_without_tokens_have_no_loss():
    """Empty rows only fill up a batch; nothing is divided by zero."""
    router = build_router(PACK_LOSSES)
    logits, rows, _ = stream((0, 0))
    assert not attached_gradient(router, logits, rows).any()
    assert all(value == 0 for value in router.losses.values())


def test_balance_of_a_step_is_of_the_tokens_so_far():
    router = build_router("--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.3")
    streams = [stream(lengths, seed=seed) for seed, lengths in enumerate([(10, 7), (12, 3)])]
    for logits, rows, _ in streams:
        attached_gradient(router, logits, rows)
    chosen, tokens = torch.zeros(4), 0
    expected = 0.0
    for logits, _, real in streams:
        real_logits = logits.squeeze(1)[real]
        chosen += torch.bincount(real_logits.topk(2).indices.flatten(), minlength=4)
        tokens += len(real_logits)
        expected += 4 * (chosen / (2 * tokens) * real_logits.softmax(-1).mean(0)).sum().item()
    assert router.losses["global_load_balancing_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_equals_megatrons_losses_where_nothing_is_padded():
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func, z_loss_func

    router = build_router("--moe-aux-loss-coeff 0.3 --moe-z-loss-coeff 0.2")
    logits, rows, _ = stream((12, 12))
    attached_gradient(router, logits, rows)
    flat = logits.squeeze(1)
    counts = torch.bincount(flat.topk(2).indices.flatten(), minlength=4)
    theirs = switch_load_balancing_loss_func(flat.softmax(-1), counts, len(flat), 2, 4, 1.0)
    assert router.losses["load_balancing_loss"].item() == pytest.approx(theirs.item(), rel=1e-6)
    assert router.losses["z_loss"].item() == pytest.approx(z_loss_func(flat, 1.0).item(), rel=1e-6)


def test_only_training_counts():
    router = build_router(f"{PACK_LOSSES} --moe-router-score-function sigmoid --moe-router-enable-expert-bias")
    logits, rows, _ = stream()
    with torch.no_grad():
        router.routing(logits, rows)  # also the first pass of a recomputed layer
    assert router.losses == {}
    assert not router.local_tokens_per_expert.any()
    router.eval().routing(logits, rows)
    assert router.losses == {}


def test_biases_count_real_tokens_in_fp32():
    router = build_router("--moe-router-score-function sigmoid --moe-router-enable-expert-bias").to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias.dtype == router.local_tokens_per_expert.dtype == torch.float32
    logits, rows, real = stream((300, 299), 300)
    router.routing(logits, rows)
    assert router.local_tokens_per_expert.sum() == 2 * real.sum() == 2 * 599


def test_gloo_cannot_send_tokens_to_split_experts(monkeypatch):
    """It cannot gather different numbers of tokens; whole experts, NCCL or the other dispatcher need not."""
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.errors import InputError
    from mft_megatron.mcore.moe.experts import expert_options
    from mft_megatron.mcore.platform import devices

    def options(extra):
        layout = (
            "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 --micro-batch-size 1"
        )
        return expert_options(parse_arguments(f"{SMALL} --data-path x {layout} {extra}".split(), 4))

    alltoall = "--moe-token-dispatcher-type alltoall"
    with pytest.raises(InputError, match=r"2 ranks split .* gloo cannot; give --expert-tensor-parallel-size 1"):
        options(alltoall)
    assert options(f"{alltoall} --expert-tensor-parallel-size 1")["expert_tensor_parallel_size"] == 1
    assert options("")["moe_token_dispatcher_type"] == "allgather"
    monkeypatch.setattr(devices, "backend", lambda choice: "nccl")
    assert options(alltoall)["moe_token_dispatcher_type"] == "alltoall"


def test_padding_uses_no_capacity():
    """The capacity of expert 0 is enough for the real tokens; padding, with larger logits, would use it all."""
    logits, rows, real = stream((6, 6))
    logits[real, 0, 0], logits[~real, 0, 0] = 2.0, 9.0
    router = build_router("--moe-expert-capacity-factor 1.0")
    probabilities, chosen = router.routing(logits, rows)
    assert chosen[real, 0].all()
    assert not chosen[~real].any()
    assert not probabilities[~real].any()
    router = build_router("--moe-expert-capacity-factor 0.5 --moe-token-drop-policy probs")
    assert router.routing(logits, rows)[1][:, 0].sum() == 24 * 2 / 4 * 0.5


def test_sinkhorn_spreads_real_tokens():
    logits, rows, real = stream((40, 38), 48)
    logits[..., 0] += 3.0
    options = "--moe-router-load-balancing-type sinkhorn --moe-router-topk 1"
    router = build_router(options)
    _, chosen = router.routing(logits, rows)
    loads = chosen[real].sum(0)
    assert loads.max() < 35
    _, other = router.routing(logits.masked_fill(~real[:, None, None], 5.0), rows)
    assert torch.equal(chosen[real], other[real])
    greedy = build_router(options, training=False).routing(logits, rows)[1][real].sum(0)
    assert greedy[0] > 60


def test_jitter_scales_the_input():
    router = build_router("--moe-input-jitter-eps 0.1")
    hidden = torch.ones(500, 1, 64)
    factors = router.apply_input_jitter(hidden)
    assert 0.9 <= factors.min() < 0.91
    assert 1.09 < factors.max() <= 1.1

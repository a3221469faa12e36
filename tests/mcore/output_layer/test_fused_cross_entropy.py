"""Fused output layer and cross entropy: against fp64 log-softmax, and against Megatron-Core's two layers on ranks."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import fake_products
from tests.ranks import run_on_ranks

HIDDEN, VOCAB, PADDED, TOKENS = 24, 131, 256, 40
# by name, a mask of supervised tokens
MASKS = {
    "some": lambda generator: torch.rand(TOKENS, generator=generator) < 0.4,
    "none": lambda generator: torch.zeros(TOKENS, dtype=bool),
    "all": lambda generator: torch.ones(TOKENS, dtype=bool),
    "one": lambda generator: torch.arange(TOKENS) == 17,
}
# what the forward pass knows of the slope
SLOPES = ("linear", "exponential", "unknown", "frozen")


def make(mask, seed=3):
    """Hidden states [T, 1, H], weight [padded V, H] (padding last, its rows large), labels, mask, slopes; fp64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.float64, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, dtype=torch.float64, generator=generator)
    weight[VOCAB:] *= 5
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[16:20] = torch.tensor([0, VOCAB - 1, 127, 128])  # ends of the vocabulary and of shards
    linear, exponential = torch.rand(2, TOKENS, dtype=torch.float64, generator=generator) / TOKENS
    return hidden, weight, labels, MASKS[mask](generator), linear, exponential


def value_of(losses, linear, exponential, kind):
    """The objective whose gradient in the losses is ``linear`` (+ ``exponential · exp(-l)``)."""
    value = (linear * losses.double()).sum()
    return value + (exponential * -torch.expm1(-losses.double())).sum() if kind == "exponential" else value


def reference(mask, kind, dtype=torch.float64):
    """Losses and gradients of hidden states and weight, by torch in fp64, from operands rounded to ``dtype``."""
    hidden, weight, labels, supervised, linear, exponential = make(mask)
    hidden, weight = (value.to(dtype).double().requires_grad_() for value in (hidden, weight))
    losses = torch.nn.functional.cross_entropy(hidden[:, 0] @ weight[:VOCAB].T, labels, reduction="none")
    losses = torch.where(supervised, losses, 0.0)
    value_of(losses, linear * supervised, exponential * supervised, kind).backward()
    return losses.detach(), hidden.grad, weight.grad


def build(tensor_parallel_size, sequence_parallel, dtype, kind, main_grad, overlap=False):
    """This rank's output layer with its shard of the weight, and Megatron's data parallelism around it or ``None``."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.mcore.output_layer.cross_entropy import FusedOutputLayer

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=tensor_parallel_size,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
    )
    layer = FusedOutputLayer(HIDDEN, PADDED, config=config, init_method=None, bias=False).to(dtype)
    weight = make("all")[1].chunk(tensor_parallel_size)[parallel_state.get_tensor_model_parallel_rank()]
    layer.weight.data.copy_(weight)
    layer.weight.requires_grad_(kind != "frozen")
    if not main_grad:
        return layer, None
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, average_in_collective=False
    )
    return layer, DistributedDataParallel(config, settings, layer)


def set_block_tokens(tokens, change=setattr):
    """Let blocks have this number of tokens on any device; evenly distributed, up to this number, on a GPU."""
    from mft_megatron.mcore.output_layer import logit_blocks

    for name in ("CPU", "GPU"):
        rule = dataclasses.replace(getattr(logit_blocks, name), bytes=0, least=tokens, least_with_weight=tokens)
        change(logit_blocks, name, rule)


def on_ranks(cases, tensor_parallel_size, sequence_parallel):
    """Losses and gradients of hidden states and weight of this rank, fused and Megatron-Core's."""
    from megatron.core import parallel_state

    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.losses.objective import Slope
    from mft_megatron.mcore.output_layer.cross_entropy import Targets, vocab_parallel_nll
    from mft_megatron.mcore.parallel import process_groups

    layout = DistributedArguments(tensor_model_parallel_size=tensor_parallel_size, sequence_parallel=sequence_parallel)
    results = {}
    with process_groups.process_groups(layout, seed=1):
        rank = parallel_state.get_tensor_model_parallel_rank()
        for case in cases:
            mask, kind, block_tokens, dtype, main_grad, place = case
            set_block_tokens(block_tokens)
            whole, _, labels, supervised, linear, exponential = make(mask)
            linear, exponential = linear * supervised, exponential * supervised
            indices = supervised.nonzero()[:, 0]
            slope = {"linear": Slope(linear), "exponential": Slope(linear, exponential)}.get(kind)
            targets = Targets(labels, indices, slope and slope.take(indices), VOCAB)
            for fused in (True, False):
                layer, _ = build(tensor_parallel_size, sequence_parallel, dtype, kind, main_grad)
                hidden = whole.chunk(tensor_parallel_size)[rank] if sequence_parallel else whole
                hidden = hidden.to(dtype).requires_grad_()
                if fused:
                    with pytest.MonkeyPatch.context() as patch:
                        if place != "cpu":
                            fake_products.install(patch, place)
                        losses = layer(hidden, targets=targets)[0]
                        value_of(losses, linear, exponential, kind).backward()
                else:
                    losses = vocab_parallel_nll(layer(hidden)[0], labels[:, None], VOCAB)[:, 0]
                    losses = torch.where(supervised, losses, 0.0)
                    value_of(losses, linear, exponential, kind).backward()
                weight = layer.weight.main_grad if main_grad and kind != "frozen" else layer.weight.grad
                results[case, fused] = losses.detach(), hidden.grad, weight
    return results


CASES = [
    ("some", "linear", 7, torch.float32, True, "cpu"),
    ("some", "exponential", 7, torch.float32, True, "cpu"),
    ("some", "unknown", 7, torch.float32, True, "cpu"),
    ("some", "frozen", 7, torch.float32, True, "cpu"),
    ("some", "linear", 5, torch.float32, False, "cpu"),
    ("some", "unknown", 5, torch.float32, False, "cpu"),
    ("all", "linear", 8, torch.float32, True, "cpu"),
    ("all", "unknown", 1000, torch.float32, True, "cpu"),
    ("one", "linear", 8, torch.float32, True, "cpu"),
    *(("none", kind, 8, torch.float32, True, "cpu") for kind in SLOPES),
    *(("some", kind, 7, torch.bfloat16, True, "cpu") for kind in SLOPES),
    ("some", "linear", 7, torch.bfloat16, False, "cpu"),
    # as on a GPU, with a release of torch
    ("some", "linear", 7, torch.float32, True, "2.10"),
    ("none", "linear", 7, torch.float32, True, "2.10"),
    *(("some", kind, 7, torch.bfloat16, True, "2.10") for kind in SLOPES),
    ("some", "linear", 7, torch.bfloat16, True, "2.8"),
    ("some", "unknown", 7, torch.bfloat16, False, "2.8"),
    ("some", "linear", 7, torch.bfloat16, True, "2.6"),
]
# with TP4 rank 2 has three real rows, and rank 3 has only padding
LAYOUTS = {"TP1": (1, False), "TP2": (2, False), "TP2 SP": (2, True), "TP4": (4, False), "TP4 SP": (4, True)}


@functools.cache
def ranks_of(layout):
    """Results of all cases on each rank of a parallel layout."""
    return run_on_ranks(LAYOUTS[layout][0], on_ranks, CASES, *LAYOUTS[layout])


def gathered(layout, case, fused):
    """Losses and both gradients, gathered from the ranks; replicated results must be the same on all of them."""
    of_ranks = [result[case, fused] for result in ranks_of(layout)]
    losses, hidden, weight = zip(*of_ranks, strict=True)
    assert all(torch.equal(value, losses[0]) for value in losses)
    if not LAYOUTS[layout][1]:
        assert all(torch.equal(value, hidden[0]) for value in hidden)
        hidden = hidden[:1]
    return losses[0], torch.cat(hidden), None if weight[0] is None else torch.cat(weight)


def assert_near(ours, theirs, tolerance):
    """Compare within a tolerance relative to the largest of ``theirs``."""
    atol = tolerance * float(theirs.abs().max()) + 1e-30
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=atol)


def named(case):
    """The name of a case."""
    return " ".join(str(part).removeprefix("torch.") for part in case)


@pytest.mark.parametrize("case", CASES, ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_fp64_and_megatron_core(layout, case):
    mask, kind, _, dtype, *_ = case
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    expected = reference(mask, kind, dtype)
    losses, hidden, weight = gathered(layout, case, fused=True)
    assert losses.dtype == torch.float32
    assert hidden.dtype == dtype
    assert torch.equal(losses == 0, ~make(mask)[3])
    for ours, theirs in zip((losses, hidden), expected, strict=False):
        assert_near(ours, theirs, tolerance)
    if kind == "frozen":
        assert weight is None
    else:
        assert_near(weight, expected[2], tolerance)
        assert not weight[VOCAB:].any()
    for ours, theirs in zip((losses, hidden, weight), gathered(layout, case, fused=False), strict=True):
        if ours is not None:
            assert_near(ours, theirs, tolerance)


def test_bf16_is_more_exact_than_megatron_core():
    """A stricter comparison than bf16's coarse tolerance: logits and sums of gradients are not rounded to bf16."""
    for case in CASES:
        if case[3] == torch.bfloat16 and case[0] == "some":
            expected = reference(case[0], case[1], case[3])
            for part in range(2 if case[1] == "frozen" else 3):
                ours, theirs = (
                    (gathered("TP2", case, fused)[part].double() - expected[part]).norm() for fused in (True, False)
                )
                # torch 2.6 rounds both
                assert ours < (1.3 if case[5] == "2.6" else (1e-4, 0.5, 0.5)[part]) * theirs, (named(case), part)


def single(hidden, weight, labels, vocab, slope, block_tokens):
    """Token losses on one rank."""
    from mft_megatron.mcore.output_layer.fused_cross_entropy import VocabularyShard, token_losses

    return token_losses(hidden, weight, labels, VocabularyShard.of(weight, vocab), slope, block_tokens)


@settings(max_examples=60, deadline=None)
@example(1, 1, 0, 1, 1, 0, True, 1.0)
@example(5, 3, 2, 4, 2, 1, False, 0.0)
@given(
    st.integers(0, 9),
    st.integers(1, 12),
    st.integers(0, 5),
    st.integers(1, 6),
    st.integers(1, 11),
    st.integers(0, 1000),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 40.0]),
)
def test_any_shape_in_fp64(tokens, vocab, padding, hidden_size, block_tokens, seed, known, spread):
    """Exact to fp64's rounding for any number of tokens, vocabulary and block, also with very different logits."""
    from mft_megatron.losses.objective import Slope

    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(tokens, hidden_size, dtype=torch.float64, generator=generator) * spread).requires_grad_()
    weight = torch.randn(vocab + padding, hidden_size, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    linear = torch.randn(tokens, dtype=torch.float64, generator=generator)
    losses = single(hidden, weight, labels, vocab, Slope(linear) if known else None, block_tokens)
    expected = torch.nn.functional.cross_entropy(hidden @ weight[:vocab].T, labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(linear @ losses, (hidden, weight))
    theirs = torch.autograd.grad(linear @ expected, (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def operands(dtype=torch.float32):
    """Hidden states [T, H], weight, labels and slopes, all tokens supervised."""
    hidden, weight, labels, _, linear, exponential = make("all")
    return hidden[:, 0].to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, linear, exponential


def test_another_slope_than_announced_is_refused():
    """The forward pass has computed the weight's gradient with it."""
    from mft_megatron.losses.objective import Slope

    hidden, weight, labels, linear, exponential = operands()
    for slope, factor in ((Slope(linear), 1.001), (Slope(linear), 2.0), (Slope(linear, exponential), 1.0)):
        with pytest.raises(RuntimeError, match="another slope"):
            (factor * linear * single(hidden, weight, labels, VOCAB, slope, 8).double()).sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 3.7, 1e-3])
def test_slope_times_the_scale_of_a_grad_scaler(scale):
    """Megatron multiplies the value in fp32, and the model the slope in fp64."""
    from mft_megatron.losses.objective import Slope

    gradients = []
    for factor in (1.0, scale):
        hidden, weight, labels, linear, exponential = operands()
        slope = Slope(linear, exponential).times(torch.tensor([factor]))
        losses = single(hidden, weight, labels, VOCAB, slope, 8)
        (value_of(losses, linear, exponential, "exponential").float() * torch.tensor([factor])).sum().backward()
        gradients.append((hidden.grad, weight.grad))
    for plain, scaled in zip(*gradients, strict=True):
        torch.testing.assert_close(scaled, plain * scale, rtol=2e-6, atol=1e-6 * scale / TOKENS)


def test_a_loss_that_is_not_finite_is_no_other_slope():
    from mft_megatron.losses.objective import Slope

    hidden, weight, labels, linear, exponential = operands()
    hidden.data[3] = float("nan")
    losses = single(hidden, weight, labels, VOCAB, Slope(linear, exponential), 8)
    value_of(losses, linear, exponential, "exponential").backward()
    assert losses.isnan().sum() == 1


def _no_gradient():
    """Losses without gradients, and the weight, whose ``main_grad`` holds another pass's gradient."""
    from mft_megatron.losses.objective import Slope

    hidden, weight, labels, linear, _ = operands()
    weight.main_grad = torch.full_like(weight, 3.0).detach()
    with torch.no_grad():
        losses = single(hidden, weight, labels, VOCAB, Slope(linear), 8)
    return losses, weight


def test_evaluation_computes_no_gradient():
    losses, weight = _no_gradient()
    assert not losses.requires_grad
    assert losses.grad_fn is None
    assert (weight.main_grad == 3).all()
    assert weight.grad is None


@pytest.mark.parametrize("slope_known", [True, False])
def test_gradients_of_micro_batches_are_added_to_main_grad(slope_known):
    """Two micro-batches whose backward passes run in either order, as in a pipeline."""
    from mft_megatron.losses.objective import Slope

    def gradient(order):
        hidden, weight, labels, linear, _ = operands()
        weight.main_grad = torch.zeros_like(weight).detach()
        halves = (slice(0, 15), slice(15, None))
        values = [
            (
                linear[half]
                * single(
                    hidden[half], weight, labels[half], VOCAB, Slope(linear[half]) if slope_known else None, 4
                ).double()
            ).sum()
            for half in halves
        ]
        for index in order:
            values[index].backward()
            # the gradient that Megatron's hook needs, and drops, takes no memory
            assert weight.grad.shape == weight.shape
            assert weight.grad.untyped_storage().nbytes() == weight.element_size()
            weight.grad = None
        assert weight.grad_added_to_main_grad
        return hidden.grad, weight.main_grad

    _, expected_hidden, expected_weight = reference("all", "linear", torch.float32)
    for order in ((0, 1), (1, 0)):
        hidden, weight = gradient(order)
        assert_near(hidden, expected_hidden[:, 0], 2e-6)
        assert_near(weight, expected_weight, 2e-6)


def _tied_and_overlapped(data_parallel):
    """The weight's gradient by (tied to the embedding, overlapped reduction, slope known)."""
    import torch.distributed as dist

    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.losses.objective import Slope
    from mft_megatron.mcore.output_layer.cross_entropy import Targets
    from mft_megatron.mcore.parallel import process_groups

    results = {}
    with process_groups.process_groups(DistributedArguments(), seed=1):
        hidden, _, labels, supervised, linear, _ = make("some")
        indices = supervised.nonzero()[:, 0]
        for tied in (False, True):
            for overlap in (False, True):
                for known in (False, True):
                    layer, model = build(1, False, torch.float32, "linear", main_grad=True, overlap=overlap)
                    if tied:
                        layer.weight.zero_out_wgrad = True  # as Megatron marks a weight with two users
                    for last in (False, True):
                        with model.no_sync() if not last else torch.enable_grad():
                            input_ = hidden.float() * (1 + dist.get_rank())
                            slope = Slope(linear).take(indices) if known else None
                            losses = model(input_, targets=Targets(labels, indices, slope, VOCAB))
                            value = (linear * supervised * losses[0].double()).sum()
                            if tied:
                                value = value + torch.nn.functional.embedding(labels, layer.weight).double().sum()
                            value.backward()
                    model.finish_grad_sync()
                    results[tied, overlap, known] = layer.weight.main_grad.clone()
    return results


def test_tied_weight_and_overlapped_reduction():
    """Hooks fire for each of two micro-batches, and the embedding's part is added once each time."""
    labels, supervised, linear = (make("some")[index] for index in (2, 3, 4))
    expected = {}
    for tied in (False, True):
        hidden, weight = (value.double().requires_grad_() for value in make("some")[:2])
        total = 0
        for rank in range(2):
            logits = hidden[:, 0] * (1 + rank) @ weight[:VOCAB].T
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            total = total + 2 * (linear * supervised * losses).sum()
            total = total + 2 * torch.nn.functional.embedding(labels, weight).sum() * tied
        (expected[tied],) = torch.autograd.grad(total, weight)
    for result in run_on_ranks(2, _tied_and_overlapped, 2):
        assert len(result) == 8
        for (tied, _, _), weight in result.items():
            assert_near(weight, expected[tied], 2e-6)


def _reached():
    """Tokens of each product, losses and gradients, where hidden states of unsupervised tokens are NaN."""
    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.losses.objective import Slope
    from mft_megatron.mcore.output_layer import fused_cross_entropy
    from mft_megatron.mcore.output_layer.cross_entropy import Targets
    from mft_megatron.mcore.parallel import process_groups

    set_block_tokens(7)
    buffer, seen = fused_cross_entropy._Buffer, []
    logits = buffer.logits
    buffer.logits = lambda self, hidden_CH: seen.append(len(hidden_CH)) or logits(self, hidden_CH)
    with process_groups.process_groups(DistributedArguments(), seed=1):
        layer, _ = build(1, False, torch.float32, "linear", main_grad=False)
        hidden, _, labels, supervised, linear, _ = make("some")
        hidden[~supervised] = float("nan")
        hidden, indices = hidden.float().requires_grad_(), supervised.nonzero()[:, 0]
        losses = layer(hidden, targets=Targets(labels, indices, Slope(linear).take(indices), VOCAB))
        (linear * supervised * losses[0].double()).sum().backward()
        return seen, losses.detach(), hidden.grad, layer.weight.grad


def test_only_supervised_tokens_reach_the_output_layer():
    """Hidden states of other tokens may be anything, and no more than a block is multiplied at a time."""
    (seen, losses, hidden, weight), supervised = run_on_ranks(1, _reached)[0], make("some")[3]
    assert sum(seen) == supervised.sum() < TOKENS
    assert max(seen) == 7
    assert losses.isfinite().all()
    assert weight.isfinite().all()
    assert not hidden[~supervised].any()


@pytest.mark.parametrize("kind", SLOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_nothing_waits_for_the_device(monkeypatch, on_gpu, dtype, kind):
    """On the meta device tensors have no values: whatever reads one fails."""
    from mft_megatron.losses.objective import Slope
    from mft_megatron.mcore.platform import devices

    monkeypatch.setattr(devices, "on_gpu", lambda tensor: on_gpu)
    hidden = torch.empty(TOKENS, HIDDEN, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(PADDED, HIDDEN, dtype=dtype, device="meta", requires_grad=kind != "frozen")
    labels = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    linear, exponential = torch.empty(2, TOKENS, dtype=torch.float64, device="meta")
    slope = {"linear": Slope(linear), "exponential": Slope(linear, exponential)}.get(kind)
    losses = single(hidden, weight, labels, VOCAB, slope, 7)
    value_of(losses, linear, exponential, kind).backward()
    assert hidden.grad.is_meta

"""Options of the network and of its initial weights do what their help says."""

import math

import pytest
import torch

from tests.ranks import run_on_ranks

SHAPE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --data-path data --seq-length 16 --micro-batch-size 1 "
    "--train-iters 1 --lr 1 --hidden-dropout 0 --attention-dropout 0"
)
ROPE = "--position-embedding-type rope"


def _weights(options):
    """Build a model for each of several option strings; return its weights and the logits of a few tokens."""
    import numpy as np

    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.model.gpt import build_model
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.parallel.device_batch import to_device
    from tests.batches import one_segment

    results = []
    for words in options:
        arguments = parse_arguments(f"{SHAPE} {words}".split())
        with process_groups.process_groups(arguments.distributed, 1):
            (chunk,) = build_model(arguments, 100)
            model = chunk.module.eval()
            with torch.no_grad():
                logits = model.run(to_device(one_segment(np.arange(3, 15, dtype=np.int64)[None])), with_loss=False)
            results.append(({name: weight.detach().clone() for name, weight in model.named_parameters()}, logits))
    return results


def of(*options):
    return run_on_ranks(1, _weights, options)[0]


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_weights_of_norms_less_1(norm):
    (plain, logits), (less, same) = of(f"--normalization {norm}", f"--normalization {norm} --apply-layernorm-1p")
    for name, weight in plain.items():
        if "norm" in name and name.endswith("weight"):
            assert weight.eq(1).all()
            assert less[name].eq(0).all()
        else:
            assert weight.equal(less[name])
    assert torch.allclose(logits, same, atol=1e-7)


def test_initial_weights():
    (plain, _), (xavier, _), (embedding, _), (both, _) = of(
        "", "--init-method-xavier-uniform", "--embedding-init-method-std 0.5",
        "--init-method-xavier-uniform --embedding-init-method-std 0.5",
    )  # fmt: skip
    for name, weight in xavier.items():
        if weight.dim() < 2:
            assert weight.equal(plain[name])
            continue
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.9 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        is_embedding = "embedding" in name
        assert embedding[name].equal(plain[name]) != is_embedding
        assert both[name].equal(weight) != is_embedding
        if is_embedding:
            assert embedding[name].std().item() == pytest.approx(0.5, rel=0.1)
            assert both[name].equal(embedding[name])


def test_the_mlp_squares_its_relu():
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.model.config import activation

    network = parse_arguments(f"{SHAPE} --squared-relu".split()).network
    assert activation(network)(torch.tensor([-2.0, 3.0])).tolist() == [0.0, 9.0]
    (_, gelu), (_, squared) = of("", "--squared-relu")
    assert not torch.allclose(gelu, squared, atol=1e-7)


def test_rotations():
    (_, plain), (_, longer), (_, one), (_, neighbours) = of(
        ROPE, f"{ROPE} --rotary-seq-len-interpolation-factor 2.5", f"{ROPE} --rotary-seq-len-interpolation-factor 1",
        f"{ROPE} --rotary-interleaved",
    )  # fmt: skip
    assert plain.equal(one)
    assert not torch.allclose(plain, longer, atol=1e-7)
    assert not torch.allclose(plain, neighbours, atol=1e-7)
    assert plain[0, 0].equal(longer[0, 0])  # the first token, at position 0
    assert plain[0, 0].equal(neighbours[0, 0])


def test_norms_stored_less_one_are_gemmas_in_bf16():
    """Norms equal Gemma's bit for bit; 1 + weight would lose digits if it were rounded to bf16."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    from mft_megatron.mcore.model.norm import RMSNorm

    config = TransformerConfig(num_layers=1, hidden_size=96, num_attention_heads=4, layernorm_zero_centered_gamma=True)
    ours, theirs = RMSNorm(config, 96, 1e-6).bfloat16(), GemmaRMSNorm(96, 1e-6).bfloat16()
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(96, generator=generator) * 0.05).bfloat16()
    with torch.no_grad():
        ours.weight.copy_(weight), theirs.weight.copy_(weight)
        hidden = torch.randn(50, 96, generator=generator).bfloat16()
        assert torch.equal(ours(hidden), theirs(hidden))


def _built_with_a_choice_of_attention(variables):
    import os

    os.environ |= variables
    _weights([""])
    return {name: os.environ[name] for name in variables}


def test_choices_of_attention_in_the_environment_stop_no_model():
    """Megatron-Core asserts that they are as it sets them."""
    asked = {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0"}
    assert run_on_ranks(1, _built_with_a_choice_of_attention, asked) == [
        {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"}
    ]

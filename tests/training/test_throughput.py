"""Operations of a step against a count of every product, on tiny shapes."""

import numpy as np
import pytest

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.training.throughput import step_operations

WORDS = (
    "--num-layers 3 --hidden-size 16 --num-attention-heads 4 --data-path data --seq-length 64 --micro-batch-size 1 "
    "--train-iters 1 --lr 1 --ffn-hidden-size 48"
)
LENGTHS = np.array([1, 7, 30])
EXPERTS = (
    "--disable-bias-linear --num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 24 --moe-layer-freq [0,1,1] "
    "--moe-shared-expert-intermediate-size 40"
)


def slow(extra, supervised, vocab_size):
    """Count every token and pair of tokens by itself: matrix products forward, three times that with backward."""
    a = parse_arguments(f"{WORDS} {extra}".split())
    n = a.network
    multiplications = 0
    for layer in range(n.num_layers):
        windowed = n.window is not None and (n.window_attn_skip_freq is None or (layer + 1) % 2)
        for length in LENGTHS:
            for token in range(length):
                multiplications += n.hidden_size * n.kv_channels * (n.num_attention_heads + 2 * n.num_query_groups)
                seen = min(token + 1, n.window + 1) if windowed else token + 1
                multiplications += 2 * seen * n.kv_channels * n.num_attention_heads
                multiplications += n.kv_channels * n.num_attention_heads * n.hidden_size
                matrices = 3 if n.swiglu or "gated" in extra else 2
                if "experts" in extra and layer > 0:
                    multiplications += n.hidden_size * 8 + matrices * n.hidden_size * (3 * 24 + 40)
                else:
                    multiplications += matrices * n.hidden_size * n.ffn_hidden_size
    multiplications += supervised * n.hidden_size * vocab_size
    return 3 * 2 * multiplications, step_operations(a, LENGTHS, 20, vocab_size)


@pytest.mark.parametrize(
    "extra",
    [
        "",
        "--swiglu --group-query-attention --num-query-groups 2 --kv-channels 8",
        "--gated-linear-unit --kv-channels 8",
        "--window-size 5,0",
        "--window-size 5,0 --window-attn-skip-freq 2",
        "--swiglu " + EXPERTS,
    ],
)
def test_every_product_is_counted(extra):
    expected, counted = slow(extra, 20, 100)
    assert counted == expected


def test_logits_of_all_tokens_are_counted_where_they_are_made():
    expected, counted = slow("--cross-entropy-impl megatron", LENGTHS.sum(), 100)
    assert counted == expected


def test_frozen_matrices_have_one_gradient_and_adapters_two():
    """q and up projections with rank 4, and what writes the MLP's output: A and B of each, three times."""
    lora = "--swiglu --peft-type lora --lora-rank 4 --lora-target-modules q_proj up_proj linear_fc2"
    whole, _ = slow("--swiglu", 20, 100)
    _, counted = slow(lora, 20, 100)
    pairs = sum(int(length) * (int(length) + 1) // 2 for length in LENGTHS)
    attention = 3 * 2 * 2 * 16 * pairs
    adapters = 3 * int(LENGTHS.sum()) * 4 * ((16 + 16) + (16 + 48) + (48 + 16))
    assert counted == (whole - 3 * attention) // 3 * 2 + 3 * attention + 3 * 2 * adapters

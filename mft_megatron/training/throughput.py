"""Operations of a step for ``--log-throughput``, counted from the lengths of its samples.

Multiplications and additions of the matrix products, forward and backward, once each: recomputation for
``--recompute-*`` and padding are not counted.
"""

import numpy as np

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.arguments.values.layer_pattern import numbers_of
from mft_megatron.data.loading.dataset import PackedSplit
from mft_megatron.lora import Lora


def step_operations(arguments: Arguments, lengths: np.ndarray, supervised_tokens: int, vocab_size: int) -> int:
    """Count the operations of a global batch, on all ranks.

    Args:
        arguments: of the run.
        lengths: int64 [segments], tokens of each segment that attends to itself.
        supervised_tokens: tokens that have a loss.
        vocab_size: real size of the vocabulary.
    """
    network, tokens = arguments.network, int(lengths.sum())
    with_logits = supervised_tokens if arguments.training.cross_entropy_impl == "fused-linear" else tokens
    products = tokens * _layer_weights(network) + with_logits * network.hidden_size * vocab_size
    # a multiplication and an addition for each element; two products, with keys and with values
    attention = 2 * _attended(network, lengths) * network.num_attention_heads * network.kv_channels
    # backward computes the gradients of both factors of a product, and of a product with a frozen matrix only one
    if arguments.adapters is None:
        return 3 * 2 * (products + attention)
    return 2 * (2 * products + 3 * (attention + tokens * _adapter_weights(network, arguments.adapters)))


def segment_lengths(split: PackedSplit, packs_G: np.ndarray) -> np.ndarray:
    """Tokens of each segment of some packs that attends to itself: a sample, or a whole row of a joined data set.

    Args:
        split: that the packs are of.
        packs_G: int64, indices of packs.

    Returns:
        int64 [segments].
    """
    slices, rows = split.slices_of_packs(packs_G)
    if not split.dataset.joined:
        return slices.lengths
    ends = np.concatenate([[0], np.cumsum(slices.lengths)])[np.cumsum(rows)]
    return np.diff(ends, prepend=0)


def _layer_weights(network: NetworkArguments) -> int:
    """Elements of the matrices that a token goes through in all layers."""
    hidden = network.hidden_size
    heads, groups = network.num_attention_heads, network.num_query_groups
    attention = hidden * network.kv_channels * (2 * heads + 2 * groups)
    matrices = 3 if network.gated else 2
    expert_layers = sum(network.expert_layers)
    dense = hidden * network.ffn_hidden_size * matrices
    total = network.num_layers * attention + (network.num_layers - expert_layers) * dense
    if network.num_experts is not None:
        size = network.moe_router_topk * (network.moe_ffn_hidden_size or network.ffn_hidden_size)
        size += network.moe_shared_expert_intermediate_size or 0
        total += expert_layers * hidden * (size * matrices + network.num_experts)
    return total


def _adapter_weights(network: NetworkArguments, lora: Lora) -> int:
    """Elements of the matrices of adapters that a token goes through in all layers, without those of B that are 0."""
    head, heads, groups = network.kv_channels, network.num_attention_heads, network.num_query_groups
    # columns of each fused matrix, and rows of each of its parts
    shapes = {
        "linear_qkv": (network.hidden_size, (heads * head, groups * head, groups * head)),
        "linear_proj": (heads * head, (network.hidden_size,)),
        "linear_fc1": (network.hidden_size, (network.ffn_hidden_size,) * 2),
        "linear_fc2": (network.ffn_hidden_size, (network.hidden_size,)),
    }
    total = 0
    for target in lora.targets:
        columns, rows = shapes[target.module]
        for part in target.parts:
            total += lora.rank * (columns + sum(rows[source] for source in part))
    return network.num_layers * total


def _attended(network: NetworkArguments, lengths: np.ndarray) -> int:
    """Pairs of a token and one that it attends to, itself included, in all layers; ``lengths`` int64 [segments]."""
    whole = int((lengths * (lengths + 1) // 2).sum())
    if network.window is None:
        return network.num_layers * whole
    seen = np.minimum(lengths, network.window + 1)
    within = int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())
    frequency = numbers_of(network.window_attn_skip_freq)
    if frequency is None:
        without = 0
    elif isinstance(frequency, int):
        without = network.num_layers // frequency
    else:
        without = frequency.count(0)
    return (network.num_layers - without) * within + without * whole

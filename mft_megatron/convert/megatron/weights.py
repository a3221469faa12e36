"""Names and shapes of every weight of an architecture, and the names under which Megatron-LM may store them.

::

    here            decoder.layers.mlp.linear_fc2.weight [layers, …]     layers stacked under one name
    Megatron-LM     the same, or decoder.layers.7.mlp.linear_fc2.weight: a name for each layer

Models whose layers differ in kind have a name for each layer here, too. The families of Hugging Face are not involved:
a model can be trained without one.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.mcore.checkpointing.vocabulary import EMBEDDING, OUTPUT_LAYER

LAYERS = "decoder.layers."
# prefixes of a norm: its name, and that of the matrix that it is fused with
_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)


@dataclasses.dataclass(frozen=True)
class StackedWeight:
    """A weight of a checkpoint.

    Attributes:
        name: its name.
        shape: shape in one layer and expert.
        stack: leading axes: layers, experts.
    """

    name: str
    shape: tuple[int, ...]
    stack: tuple[int, ...] = ()

    @property
    def indices(self) -> Iterator[tuple[int, ...]]:
        """Every index in the stack: ``(layer, expert)``, ``(layer,)``, or only ``()``."""
        return itertools.product(*map(range, self.stack))


def weights_of(architecture: NetworkArguments, vocab_size: int) -> list[StackedWeight]:
    """List every weight of an architecture.

    Args:
        architecture: the architecture. Layers of one kind are stacked, those of several kinds have a name each.
        vocab_size: tokens, without padding.
    """
    a = architecture
    weights = [StackedWeight(EMBEDDING, (vocab_size, a.hidden_size))]
    if a.position_embedding_type == "learned_absolute":
        shape = (a.max_position_embeddings, a.hidden_size)
        weights.append(StackedWeight("embedding.position_embeddings.weight", shape))
    if a.num_experts is None or a.moe_layer_freq == 1:
        weights += _layer(a, LAYERS, (a.num_layers,), a.num_experts)
    else:
        for layer, has_experts in enumerate(a.expert_layers):
            weights += _layer(a, f"{LAYERS}{layer}.", (), a.num_experts if has_experts else None)
    weights += _norm(a, "decoder.final_layernorm.")
    if not a.tie_embeddings:
        weights.append(StackedWeight(OUTPUT_LAYER, (vocab_size, a.hidden_size)))
    return weights


def stored_names(name: str, index: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """List the names that a weight of one layer and expert may have in a checkpoint of Megatron-LM.

    Args:
        name: name here.
        index: index in the stack here.

    Returns:
        names, each with the index in the stack that is stored under it.
    """
    if not name.startswith(LAYERS):
        return [(name, index)]
    rest = name.removeprefix(LAYERS)
    if rest[0].isdigit():  # layers that differ in kind have a name each in every checkpoint
        layer, rest = rest.split(".", 1)
        return [(f"{LAYERS}{layer}.{spelling}", index) for spelling in _spellings(rest)]
    stacked = [(LAYERS + spelling, index) for spelling in _spellings(rest)]
    return stacked + [(f"{LAYERS}{index[0]}.{spelling}", index[1:]) for spelling in _spellings(rest)]


def _spellings(rest: str) -> list[str]:
    """The name of a weight within its layer, and the other name if it belongs to a norm that has two."""
    for pair in _NORMS:
        for prefix, other in (pair, pair[::-1]):
            if rest.startswith(prefix):
                return [rest, other + rest.removeprefix(prefix)]
    return [rest]


def _layer(a: NetworkArguments, prefix: str, stack: tuple[int, ...], experts: int | None) -> list[StackedWeight]:
    """Weights of the layers that ``stack`` counts; ``experts``: number of their experts, ``None`` for an MLP."""
    head, attention = a.kv_channels, prefix + "self_attention."
    queries = a.num_attention_heads * head
    fused = queries + 2 * a.num_query_groups * head
    weights = [
        *_norm(a, attention + "linear_qkv.layer_norm_", stack),
        *_linear(attention + "linear_qkv", fused, a.hidden_size, a.qkv_bias, stack),
        *_linear(attention + "linear_proj", a.hidden_size, queries, a.attention_bias, stack),
    ]
    if a.qk_layernorm:
        weights += _norm(a, attention + "q_layernorm.", stack, head) + _norm(a, attention + "k_layernorm.", stack, head)
    if experts is None:
        weights += _norm(a, prefix + "mlp.linear_fc1.layer_norm_", stack)
        return weights + _mlp(a, prefix + "mlp.", a.ffn_hidden_size, stack)
    weights += _norm(a, prefix + "pre_mlp_layernorm.", stack)
    weights.append(StackedWeight(prefix + "mlp.router.weight", (experts, a.hidden_size), stack))
    if a.moe_router_enable_expert_bias:
        weights.append(StackedWeight(prefix + "mlp.router.expert_bias", (experts,), stack))
    size = a.moe_ffn_hidden_size or a.ffn_hidden_size
    weights += _mlp(a, prefix + "mlp.experts.experts.", size, (*stack, experts))
    if a.moe_shared_expert_intermediate_size is not None:
        weights += _mlp(a, prefix + "mlp.shared_experts.", a.moe_shared_expert_intermediate_size, stack)
        if a.moe_shared_expert_gate:
            weights.append(StackedWeight(prefix + "mlp.shared_experts.gate_weight", (1, a.hidden_size), stack))
    return weights


def _mlp(a: NetworkArguments, prefix: str, size: int, stack: tuple[int, ...]) -> list[StackedWeight]:
    gated = 2 * size if a.swiglu else size
    return [
        *_linear(prefix + "linear_fc1", gated, a.hidden_size, a.mlp_bias, stack),
        *_linear(prefix + "linear_fc2", a.hidden_size, size, a.mlp_bias, stack),
    ]


def _linear(name: str, rows: int, columns: int, bias: bool, stack: tuple[int, ...]) -> list[StackedWeight]:
    weight = StackedWeight(f"{name}.weight", (rows, columns), stack)
    return [weight, StackedWeight(f"{name}.bias", (rows,), stack)] if bias else [weight]


def _norm(
    a: NetworkArguments, prefix: str, stack: tuple[int, ...] = (), size: int | None = None
) -> list[StackedWeight]:
    kinds = ("weight",) if a.normalization == "RMSNorm" else ("weight", "bias")
    return [StackedWeight(prefix + kind, (size or a.hidden_size,), stack) for kind in kinds]

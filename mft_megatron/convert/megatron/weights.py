"""Every weight of an architecture by its name in a distributed checkpoint, and where Megatron-LM may keep its parts.

::

    ours       decoder.layers.mlp.linear_fc2.weight [layers, …]     all layers under one name
    theirs     the same; or decoder.layers.7.mlp.linear_fc2.weight, a name for each layer

Models whose layers are of more than one kind have a name for each layer here, too. Families of Hugging Face have no say
in this: a model needs none to be trained.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.mcore.checkpointing.vocabulary import EMBEDDING, OUTPUT_LAYER

LAYERS = "decoder.layers."
# a norm stands by itself, or goes by the name of the matrix that follows it
_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight of the checkpoint: ``stack``, its leading axes (layers, experts), and the ``shape`` of one of them."""

    name: str
    shape: tuple[int, ...]
    stack: tuple[int, ...] = ()

    @property
    def places(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*map(range, self.stack))


def weights_of(architecture: NetworkArguments, vocab_size: int) -> list[Stored]:
    """Every weight, the vocabulary without padding.

    Layers of one kind are stacked under one name, those of several kinds have a name each.
    """
    a, found = architecture, []
    found.append(Stored(EMBEDDING, (vocab_size, a.hidden_size)))
    if a.position_embedding_type == "learned_absolute":
        found.append(Stored("embedding.position_embeddings.weight", (a.max_position_embeddings, a.hidden_size)))
    if a.num_experts is None or a.moe_layer_freq == 1:
        found += _layer(a, LAYERS, (a.num_layers,), a.num_experts is not None)
    else:
        for layer, has_experts in enumerate(a.expert_layers):
            found += _layer(a, f"{LAYERS}{layer}.", (), has_experts)
    found += _norm(a, "decoder.final_layernorm.")
    if not a.tie_embeddings:
        found.append(Stored(OUTPUT_LAYER, (vocab_size, a.hidden_size)))
    return found


def names_there(name: str, place: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Where a part of a weight may be in a checkpoint of Megatron-LM: names, each with its place in a stack."""
    if not name.startswith(LAYERS):
        return [(name, place)]
    rest = name.removeprefix(LAYERS)
    if rest[0].isdigit():  # a name for each layer here, so there too
        layer, rest = rest.split(".", 1)
        return [(f"{LAYERS}{layer}.{one}", place) for one in _spellings(rest)]
    alike = [(LAYERS + one, place) for one in _spellings(rest)]
    return alike + [(f"{LAYERS}{place[0]}.{one}", place[1:]) for one in _spellings(rest)]


def _spellings(rest: str) -> list[str]:
    for pair in _NORMS:
        for one, other in (pair, pair[::-1]):
            if rest.startswith(one):
                return [rest, other + rest.removeprefix(one)]
    return [rest]


def _layer(a: NetworkArguments, prefix: str, stack: tuple[int, ...], has_experts: bool) -> list[Stored]:
    head, attention = a.kv_channels, prefix + "self_attention."
    queries = a.num_attention_heads * head
    fused = queries + 2 * a.num_query_groups * head
    found = [
        *_norm(a, attention + "linear_qkv.layer_norm_", stack),
        *_linear(attention + "linear_qkv", fused, a.hidden_size, a.add_bias_linear or a.add_qkv_bias, stack),
        *_linear(attention + "linear_proj", a.hidden_size, queries, a.add_bias_linear, stack),
    ]
    if a.qk_layernorm:
        found += _norm(a, attention + "q_layernorm.", stack, head) + _norm(a, attention + "k_layernorm.", stack, head)
    if not has_experts:
        return (
            found + _norm(a, prefix + "mlp.linear_fc1.layer_norm_", stack) + _mlp(a, prefix, a.ffn_hidden_size, stack)
        )
    found += _norm(a, prefix + "pre_mlp_layernorm.", stack)
    found.append(Stored(prefix + "mlp.router.weight", (a.num_experts, a.hidden_size), stack))
    if a.moe_router_enable_expert_bias:
        found.append(Stored(prefix + "mlp.router.expert_bias", (a.num_experts,), stack))
    found += _mlp(a, prefix, a.moe_ffn_hidden_size, (*stack, a.num_experts), "mlp.experts.experts.")
    if a.moe_shared_expert_intermediate_size is not None:
        found += _mlp(a, prefix, a.moe_shared_expert_intermediate_size, stack, "mlp.shared_experts.")
        if a.moe_shared_expert_gate:
            found.append(Stored(prefix + "mlp.shared_experts.gate_weight", (1, a.hidden_size), stack))
    return found


def _mlp(a: NetworkArguments, prefix: str, size: int, stack: tuple[int, ...], name: str = "mlp.") -> list[Stored]:
    gated = 2 * size if a.swiglu else size
    return [
        *_linear(f"{prefix}{name}linear_fc1", gated, a.hidden_size, a.add_bias_linear, stack),
        *_linear(f"{prefix}{name}linear_fc2", a.hidden_size, size, a.add_bias_linear, stack),
    ]


def _linear(name: str, rows: int, columns: int, bias: bool, stack: tuple[int, ...]) -> list[Stored]:
    found = [Stored(f"{name}.weight", (rows, columns), stack)]
    return [*found, Stored(f"{name}.bias", (rows,), stack)] if bias else found


def _norm(a: NetworkArguments, name: str, stack: tuple[int, ...] = (), size: int | None = None) -> list[Stored]:
    kinds = ("weight",) if a.normalization == "RMSNorm" else ("weight", "bias")
    return [Stored(name + kind, (size or a.hidden_size,), stack) for kind in kinds]

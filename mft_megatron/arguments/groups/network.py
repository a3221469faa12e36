"""Options of the model's architecture."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mft_megatron.arguments.values.expert_layers import expert_layers
from mft_megatron.arguments.values.layer_pattern import layer_frequency
from mft_megatron.arguments.values.rope_scaling import RopeScaling, read_rope_scaling, rope_scaling
from mft_megatron.arguments.values.window import window_size
from mft_megatron.errors import InputError
from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class NetworkArguments:
    """The model's architecture. With --load it comes from the checkpoint and need not be given."""

    num_layers: int = option(
        None,
        "Number of transformer layers.",
        at_least=1,
        required="--num-layers N, or --load a checkpoint that knows it",
    )
    hidden_size: int = option(
        None, "Size of the hidden states.", at_least=1, required="--hidden-size N, or --load a checkpoint that knows it"
    )
    ffn_hidden_size: int = option(
        None,
        "Size of the MLP. Not given: 4 × hidden size, or 2/3 of that in steps of 64 with --swiglu.",
        at_least=1,
        derived=True,
    )
    num_attention_heads: int = option(
        None,
        "Number of attention heads.",
        at_least=1,
        required="--num-attention-heads N, or --load a checkpoint that knows it",
    )
    group_query_attention: bool = option(False, "Grouped-query attention.")
    num_query_groups: int = option(1, "Key/value heads of --group-query-attention.", at_least=1)
    kv_channels: int = option(
        None, "Size of a head. Not given: hidden size / attention heads.", at_least=1, derived=True
    )
    max_position_embeddings: int = option(
        None, "Longest sequence that the model supports. Not given: --seq-length.", at_least=1, derived=True
    )
    position_embedding_type: str = option(
        "learned_absolute",
        "Position embedding. Megatron's default is not what code LLMs use: they need rope.",
        choices=("learned_absolute", "rope", "none"),
    )
    rotary_base: float = option(
        10000.0, "Base of the rotary frequencies; unlike in Megatron it need not be a whole number.", at_least=2
    )
    rotary_interleaved: bool = option(
        False, "Rotate neighbouring elements of a head together, not those of its two halves."
    )
    rotary_seq_len_interpolation_factor: float | None = option(
        None,
        "Divide positions by this: linear interpolation to a longer context. Megatron takes whole numbers only.",
        above=0,
    )
    rotary_percent: float = option(1.0, "Fraction of each head that is rotated.", above=0, at_most=1)
    rope_scaling: str | None = option(
        None,
        "Scaling of rotary frequencies for longer contexts, with the names of Hugging Face's config.json: "
        '\'{"rope_type": "linear", "factor": 4}\'; llama3 or yarn with their numbers. Replaces Megatron\'s '
        "--use-rope-scaling, which has only the numbers of Llama 3.",
        reader=rope_scaling,
        metavar="JSON",
    )
    window_size: str | None = option(
        None,
        "Tokens to its left, within its sample, that a token attends to, itself not counted; -1 for all; and 0 to its "
        "right.",
        reader=window_size,
        metavar="LEFT,0",
    )
    window_attn_skip_freq: int | str | None = option(
        None,
        "Layers without the window of --window-size: every N-th, or with a list the layers that have a 0 there, as "
        "in ([1]*3+[0])*2 for eight layers. Not given: none.",
        reader=layer_frequency,
        metavar="{N,LIST}",
    )
    normalization: str = option("LayerNorm", "Normalisation layers.", choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = option(1e-5, "Epsilon of the normalisation layers.", above=0)
    apply_layernorm_1p: bool = option(
        False, "Store weights of the normalisation layers minus 1, so that they start from 0."
    )
    squared_relu: bool = option(False, "Squared ReLU in the MLP instead of GELU.")
    swiglu: bool = option(False, "Gated linear units with SiLU in the MLP instead of GELU.")
    openai_gelu: bool = option(False, "GELU by its tanh approximation; by default it is exact.")
    gated_linear_unit: bool = option(
        False,
        "Gated linear units with the activation function of the other options: GeGLU, with --openai-gelu by the "
        "tanh approximation as in Gemma. SwiGLU is --swiglu. Not Megatron's; the name is from Megatron-Core's "
        "configuration.",
    )
    parallel_residual: bool = option(
        False, "Attention and MLP in parallel, both on the layer's input, as in GPT-NeoX; not Megatron's."
    )
    add_bias_linear: bool = option(True, "No bias in the linear layers.", flag="--disable-bias-linear")
    add_qkv_bias: bool = option(False, "Bias in the query/key/value projection only.")
    add_attention_bias: bool = option(
        False,
        "With --disable-bias-linear: bias in both linear layers of attention all the same, as in a Llama whose "
        "config.json has attention_bias. Not Megatron's.",
    )
    add_mlp_bias: bool = option(
        False, "With --disable-bias-linear: bias in the linear layers of the MLP all the same. Not Megatron's."
    )
    qk_layernorm: bool = option(False, "Normalise queries and keys.")
    tie_embeddings: bool = option(
        True,
        "Separate weights for the output layer; by default it uses the embedding's.",
        flag="--untie-embeddings-and-output-weights",
    )
    scale_embeddings_by_hidden_size: bool = option(
        False,
        "Multiply word embeddings by the square root of the hidden size, rounded to the weights' precision, as in "
        "Gemma; the output layer is unchanged. Not Megatron's; the name is Megatron-Bridge's.",
    )
    make_vocab_size_divisible_by: int = option(
        128,
        "The vocabulary is padded to a multiple of this times the tensor-parallel size. Unlike in Megatron, the "
        "softmax ignores padded rows, so that the padding does not change the loss.",
        at_least=1,
    )
    num_experts: int | None = option(
        None, "Experts of each mixture-of-experts layer; not given: every MLP is dense.", at_least=1
    )
    moe_layer_freq: int | str = option(
        1,
        "Which layers have experts: N for the first of every N, or a list of 1 (experts) and 0 (dense MLP) for all "
        "layers, such as '[0]+[1]*23' or '([1]*3+[0])*2'. Layers of a model with both kinds are stored one by one.",
        reader=layer_frequency,
        metavar="N|LIST",
    )
    moe_ffn_hidden_size: int | None = option(None, "Size of an expert. Not given: --ffn-hidden-size.", at_least=1)
    moe_router_topk: int = option(2, "Experts that each token goes to.", at_least=1)
    moe_router_pre_softmax: bool = option(
        False,
        "Softmax over the scores of all experts before the best are chosen, not over the scores of the chosen ones.",
    )
    moe_router_score_function: str = option(
        "softmax", "Function that turns the router's scores into probabilities.", choices=("softmax", "sigmoid")
    )
    moe_router_topk_scaling_factor: float | None = option(
        None, "Factor on the probabilities of the chosen experts.", above=0
    )
    moe_router_num_groups: int | None = option(
        None, "Groups of experts; each token goes to experts of --moe-router-group-topk of them.", at_least=1
    )
    moe_router_group_topk: int | None = option(
        None, "Groups that the experts of a token may be in, with --moe-router-num-groups.", at_least=1
    )
    moe_router_enable_expert_bias: bool = option(
        False,
        "Choose experts by probability plus a bias of each expert, which grows by --moe-router-bias-update-rate with "
        "each step where the expert had fewer tokens than the mean, and falls where it had more; with "
        "--moe-router-score-function sigmoid.",
    )
    moe_shared_expert_intermediate_size: int | None = option(
        None, "Total size of the shared experts, which every token goes to. Not given: none.", at_least=1
    )
    moe_shared_expert_gate: bool = option(False, "A sigmoid gate on the shared experts' output.")

    @property
    def qkv_bias(self) -> bool:
        """Whether the query/key/value projection has a bias."""
        return self.attention_bias or self.add_qkv_bias

    @property
    def attention_bias(self) -> bool:
        """Whether both linear layers of attention have a bias."""
        return self.add_bias_linear or self.add_attention_bias

    @property
    def mlp_bias(self) -> bool:
        """Whether the linear layers of the MLP have a bias."""
        return self.add_bias_linear or self.add_mlp_bias

    @property
    def gated(self) -> bool:
        """Whether MLPs have a gate: two matrices instead of one before the activation function."""
        return self.swiglu or self.gated_linear_unit

    @property
    def expert_size(self) -> int:
        """Size of the MLP of an expert."""
        return self.ffn_hidden_size if self.moe_ffn_hidden_size is None else self.moe_ffn_hidden_size

    @property
    def window(self) -> int | None:
        """Tokens to its left that a token attends to in layers with a window, itself not counted; ``None`` for all."""
        left = -1 if self.window_size is None else int(self.window_size.split(",")[0])
        return None if left < 0 else left

    @property
    def scaling(self) -> RopeScaling | None:
        """The scaling of rotary frequencies, or ``None``."""
        return None if self.rope_scaling is None else read_rope_scaling(json.loads(self.rope_scaling))

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it has experts."""
        return expert_layers(self.num_layers, self.num_experts, self.moe_layer_freq)


def stored_network(architecture: Mapping[str, Any], where: str) -> NetworkArguments:
    """Make the architecture that the description of a checkpoint names.

    Args:
        architecture: fields by name; those that an earlier version did not write have their defaults.
        where: the checkpoint, for messages.

    Raises:
        InputError: it has a field that this version does not know.
    """
    unknown = sorted(architecture.keys() - {field.name for field in dataclasses.fields(NetworkArguments)})
    if unknown:
        raise InputError(
            f"{where}: its architecture has {', '.join(unknown)}, which this version does not know; a newer version "
            "made it, use that"
        )
    return NetworkArguments(**architecture)

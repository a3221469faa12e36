"""The architecture of a checkpoint of Megatron-LM or Megatron-Bridge, from the arguments of Megatron-LM.

::

    common state: args (Megatron-LM) ─────────────────────────────────┐
    run_config.yaml: model (Megatron-Bridge) ─► names of Megatron-LM ─┴─► NetworkArguments

What this program cannot express is refused by name. Arguments that shape a weight need no refusal, since the weights
are compared with the architecture afterwards; the table of refusals has those that change only the function.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.arguments.values.layer_pattern import layer_frequency
from mft_megatron.arguments.values.rope_scaling import read_rope_scaling
from mft_megatron.errors import InputError
from mft_megatron.options import info_of

# arguments of Megatron-LM by name
Args: TypeAlias = Mapping[str, object]

# fields of NetworkArguments that are arguments of the same name
_SAME = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels max_position_embeddings rotary_percent "
    "rotary_interleaved normalization squared_relu swiglu add_bias_linear add_qkv_bias qk_layernorm num_experts "
    "moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax moe_router_score_function "
    "moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias "
    "moe_shared_expert_intermediate_size moe_shared_expert_gate make_vocab_size_divisible_by"
).split()
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")
# arguments that must be off, and the values that switch them off; older versions lack some
_OFF: Mapping[str, tuple[object, ...]] = {
    "multi_latent_attention": (False,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "heterogeneous_block_specs": (False,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_type": (None,),
    "linear_attention_freq": (None,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "qk_l2_norm": (False,),
    "no_rope_freq": (None,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "apply_residual_connection_post_layernorm": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0, 0.0),
    "activation_func_clamp_value": (None,),
    "use_mup": (False,),
    "enable_mhc_connections": (False,),
    "moe_latent_size": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "moe_router_topk_limited_devices": (None,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_force_biased": (None,),
    "mrope_section": (None,),
    "spec": (None,),
    "add_position_embedding": (True,),
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_megatron_lm(args: Args) -> NetworkArguments:
    """Read the architecture of a checkpoint of Megatron-LM.

    Args:
        args: attributes of the namespace ``args`` of its common state.

    Raises:
        InputError: an argument is missing, or says what this program cannot express.
    """
    factor = args.get("rope_scaling_factor", 8.0)
    if args.get("use_rope_scaling") and factor != 8.0:
        raise InputError(f"rope_scaling_factor is {factor}, which not every version of Megatron-LM looks at")
    return network_of(args)


def network_of(args: Args) -> NetworkArguments:
    """Read the architecture from arguments of Megatron-LM, whichever program they come from.

    Raises:
        InputError: an argument is missing, or says what this program cannot express.
        TypeError, ValueError, KeyError: an argument has another type than Megatron-LM's.
    """
    for name in _REQUIRED:
        if not isinstance(args.get(name), int):
            raise InputError(f"{name} is {args.get(name)!r}; the checkpoint does not say what model it is of")
    for name, allowed in _OFF.items():
        if name in args and args[name] not in allowed:
            raise InputError(f"{name} is {args[name]!r}, which this program cannot express")
    # fields differ in type
    fields: dict[str, Any] = {name: args[name] for name in _SAME if args.get(name) is not None}
    if args.get("disable_bias_linear"):
        fields["add_bias_linear"] = False
    heads = fields["num_attention_heads"]
    groups = args.get("num_query_groups") if args.get("group_query_attention") else None
    fields["num_query_groups"] = heads if groups is None else groups
    fields["group_query_attention"] = fields["num_query_groups"] != heads
    fields.setdefault("kv_channels", fields["hidden_size"] // heads)
    if not isinstance(fields.get("ffn_hidden_size"), int):
        raise InputError("ffn_hidden_size is not given; the checkpoint does not say what model it is of")
    fields["norm_epsilon"] = args.get("layernorm_epsilon", args.get("norm_epsilon", 1e-5))
    fields["apply_layernorm_1p"] = bool(args.get("layernorm_zero_centered_gamma", args.get("apply_layernorm_1p")))
    fields["tie_embeddings"] = not args.get("untie_embeddings_and_output_weights", False)
    gelu = not args.get("swiglu") and not args.get("squared_relu")
    # Megatron's fused GELU is the tanh approximation, the other one is exact
    fields["openai_gelu"] = gelu and bool(args.get("bias_gelu_fusion")) and fields.get("add_bias_linear", True)
    if fields.get("num_experts") is None:
        fields = {name: value for name, value in fields.items() if not name.startswith("moe_")}
    else:
        fields.setdefault("moe_ffn_hidden_size", fields["ffn_hidden_size"])
        fields["moe_layer_freq"] = _frequency(args.get("moe_layer_freq", 1))
        for balancing in ("sinkhorn", "quantile_balancing"):
            if balancing in str(args.get("moe_router_load_balancing_type")):
                raise InputError(f"moe_router_load_balancing_type is {balancing}, which this program cannot express")
    for field in dataclasses.fields(NetworkArguments):
        choices, value = info_of(field).choices, fields.get(field.name)
        if choices and value is not None and value not in choices:
            raise InputError(f"{field.name} is {value!r}, which this program cannot express")
    return NetworkArguments(**fields, **_positions(args), **_window(args))


def _positions(args: Args) -> dict[str, Any]:
    """Fields of positions."""
    kind = "rope" if args.get("use_rotary_position_embeddings") else args.get("position_embedding_type")
    if kind not in ("learned_absolute", "rope", "none"):
        raise InputError(f"position_embedding_type is {kind!r}, which this program cannot express")
    fields = {"position_embedding_type": kind, "rotary_base": _number(args.get("rotary_base", 10000))}
    if kind == "rope" and args.get("use_rope_scaling"):
        factor = _number(args.get("rope_scaling_factor", 8.0))
        fields["rope_scaling"] = read_rope_scaling({"rope_type": "llama3", "factor": factor, **_LLAMA3}).as_text()
    return fields


def _window(args: Args) -> dict[str, Any]:
    """Fields of sliding windows."""
    window = args.get("window_size")
    if window is None:
        return {}
    if not isinstance(window, Sequence) or len(window) != 2:
        raise ValueError(f"window_size is {window!r}")
    left, right = window
    if right not in (0, -1):
        raise InputError(f"window_size is {window!r}; tokens to the right are not seen in this program")
    skipped = args.get("window_attn_skip_freq")
    return {
        "window_size": f"{left},0",
        "window_attn_skip_freq": None if skipped is None else _frequency(skipped),
    }


def _number(value: object) -> float:
    if not isinstance(value, int | float | str):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _frequency(value: object) -> int | str:
    """Convert "every so many layers", or a list of layers, to the value of the option."""
    frequency = layer_frequency(value if isinstance(value, str) else json.dumps(value))
    return 1 if isinstance(frequency, str) and set(json.loads(frequency)) == {1} else frequency

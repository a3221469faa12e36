"""The architecture that a checkpoint of Megatron-LM or Megatron-Bridge says it has.

::

    common.pt: args (Megatron-LM) ───────────────────────┐
    run_config.yaml: model (Megatron-Bridge) ─► renamed ──┴─► NetworkArguments

What this program cannot express is refused by name. What shapes a weight cannot slip through in any case, since weights
are compared with the architecture afterwards; the table of refusals is for what changes the function and no weight.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.arguments.values.layer_pattern import layer_frequency
from mft_megatron.arguments.values.rope_scaling import read_rope_scaling
from mft_megatron.errors import InputError

# fields that go by the same name there
_SAME = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels max_position_embeddings rotary_percent "
    "rotary_interleaved normalization squared_relu swiglu add_bias_linear add_qkv_bias qk_layernorm num_experts "
    "moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax moe_router_score_function "
    "moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias "
    "moe_shared_expert_intermediate_size moe_shared_expert_gate make_vocab_size_divisible_by"
).split()
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")
# what must be off, by its value when it is; absent in versions that do not know it
_OFF: dict[str, tuple[Any, ...]] = {
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
    "mrope_section": (None,),
    "spec": (None,),
    "add_position_embedding": (True,),
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Megatron-Bridge's names of the same, where they differ
_BRIDGE = {
    "num_moe_experts": "num_experts",
    "seq_length": "max_position_embeddings",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
# of Megatron-Bridge's kinds of models those that are nothing but what their entries say
_KNOWN_KINDS = re.compile(
    r"GPTModel(Provider|Config)|(Code)?Llama\d*ModelProvider\w*|Qwen(2|25|3|3MoE)ModelProvider\w*|"
    r"(Mistral|Mixtral)ModelProvider\w*"
)
_ACTIVATIONS = {
    "torch.nn.functional.silu": "silu",
    "torch.nn.functional.gelu": "gelu",
    "torch._C._nn.gelu": "gelu",
    "megatron.core.activations.squared_relu": "squared_relu",
}


def read_megatron_lm(args: Mapping[str, Any]) -> NetworkArguments:
    """The architecture of a checkpoint of Megatron-LM.

    Args:
        args: what the namespace ``args`` of its ``common.pt`` holds.

    Raises:
        InputError: an argument is missing, or says what this program cannot express.
    """
    factor = args.get("rope_scaling_factor", 8.0)
    if args.get("use_rope_scaling") and factor != 8.0:
        raise InputError(f"rope_scaling_factor is {factor}, which not every version of Megatron-LM looks at")
    return _network(args)


def read_bridge(model: Mapping[str, Any]) -> NetworkArguments:
    """The architecture of a checkpoint of Megatron-Bridge.

    Args:
        model: the section ``model`` of its ``run_config.yaml``.

    Raises:
        InputError: an entry is missing, or says what this program cannot express.
    """
    kind = str(model.get("_target_", "")).split(".")[-1]
    if not _KNOWN_KINDS.fullmatch(kind):
        raise InputError(f"model {kind!r} may compute what its entries do not say; convert it with Megatron-Bridge")
    return _network(_names_of_megatron_lm(model))


def _network(args: Mapping[str, Any]) -> NetworkArguments:
    for name in _REQUIRED:
        if not isinstance(args.get(name), int):
            raise InputError(f"{name} is {args.get(name)!r}; the checkpoint does not say what model it is of")
    for name, allowed in _OFF.items():
        if name in args and args[name] not in allowed:
            raise InputError(f"{name} is {args[name]!r}, which this program cannot express")
    fields = {name: args[name] for name in _SAME if args.get(name) is not None}
    if args.get("disable_bias_linear"):
        fields["add_bias_linear"] = False
    heads = args["num_attention_heads"]
    groups = args.get("num_query_groups") if args.get("group_query_attention") else None
    fields["num_query_groups"] = heads if groups is None else groups
    fields["group_query_attention"] = fields["num_query_groups"] != heads
    fields.setdefault("kv_channels", args["hidden_size"] // heads)
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
        if "sinkhorn" in str(args.get("moe_router_load_balancing_type")):
            raise InputError("moe_router_load_balancing_type is sinkhorn, which this program cannot express")
    return NetworkArguments(**fields, **_positions(args), **_window(args))


def _positions(args: Mapping[str, Any]) -> dict[str, Any]:
    kind = "rope" if args.get("use_rotary_position_embeddings") else args.get("position_embedding_type")
    if kind not in ("learned_absolute", "rope", "none"):
        raise InputError(f"position_embedding_type is {kind!r}, which this program cannot express")
    found = {"position_embedding_type": kind, "rotary_base": float(args.get("rotary_base", 10000))}
    if kind == "rope" and args.get("use_rope_scaling"):
        entries = {"rope_type": "llama3", "factor": float(args.get("rope_scaling_factor", 8.0)), **_LLAMA3}
        found["rope_scaling"] = read_rope_scaling(entries).as_text()
    return found


def _window(args: Mapping[str, Any]) -> dict[str, Any]:
    window = args.get("window_size")
    if window is None:
        return {}
    left, right = window
    if right not in (0, -1):
        raise InputError(f"window_size is {window!r}; tokens to the right are not seen in this program")
    skipped = args.get("window_attn_skip_freq")
    return {
        "window_size": f"{left},0",
        "window_attn_skip_freq": None if skipped is None else _frequency(skipped),
    }


def _frequency(value: Any) -> int | str:
    """Every so many layers, or a list of them, as the option says it."""
    found = layer_frequency(value if isinstance(value, str) else json.dumps(value))
    return 1 if isinstance(found, str) and set(json.loads(found)) == {1} else found


def _names_of_megatron_lm(model: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron-LM's arguments would say of a model of Megatron-Bridge."""
    found = {_BRIDGE.get(name, name): value for name, value in model.items()}
    target = model.get("activation_func")
    target = target.get("_target_") if isinstance(target, Mapping) else target
    activation, gated = _ACTIVATIONS.get(target), bool(model.get("gated_linear_unit"))
    if activation is None or gated != (activation == "silu"):
        raise InputError(f"activation_func {target!r} {'with' if gated else 'without'} a gate cannot be expressed")
    groups = model.get("num_query_groups")
    return found | {
        "swiglu": activation == "silu",
        "squared_relu": activation == "squared_relu",
        "bias_gelu_fusion": bool(model.get("bias_activation_fusion")),
        "group_query_attention": groups is not None,
        "untie_embeddings_and_output_weights": not model.get("share_embeddings_and_output_weights", True),
    }

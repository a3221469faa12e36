"""The architecture that a checkpoint of Megatron-LM or Megatron-Bridge describes."""

import pytest
import torch
import yaml

from mft_megatron.convert.megatron.arguments import read_megatron_lm
from mft_megatron.convert.megatron.description import read_description
from mft_megatron.errors import InputError
from tests.convert.megatron_models import SHAPE, VOCABULARY, args_of

# entries of Megatron-Bridge for such a model, where names or values differ from those of Megatron-LM
BRIDGE = {
    "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "gated_linear_unit": True,
    "num_moe_experts": None,
    "num_query_groups": 2,
    "seq_length": 64,
    "share_embeddings_and_output_weights": False,
    "rope_scaling": True,
    "rope_scaling_factor": 8.0,
    "params_dtype": {"_target_": "torch.float32", "_call_": False},
    "vocab_size": VOCABULARY,
}


def bridge(folder, **changes):
    """Write the description of a checkpoint of Megatron-Bridge, and no weights."""
    absent = ("swiglu", "squared_relu", "group_query_attention", "num_experts", "use_rope_scaling", "save")
    absent += ("max_position_embeddings", "untie_embeddings_and_output_weights", "bias_gelu_fusion", "params_dtype")
    model = {**{name: value for name, value in args_of("llama").items() if name not in absent}, **BRIDGE, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": model, "train": {"train_iters": 5}}))
    torch.save({"checkpoint_version": 3.0, "iteration": 7}, folder / "common.pt")
    return folder


def test_megatron_bridge_describes_the_same_architecture(tmp_path):
    expected = read_megatron_lm(args_of("llama"))
    assert read_description(bridge(tmp_path)) == (expected, VOCABULARY)
    assert read_description(bridge(tmp_path, seq_len_interpolation_factor=None, vocab_size=None)) == (expected, None)
    scaled = read_description(bridge(tmp_path, rope_scaling_factor=32.0))[0]
    assert scaled.scaling.factor == 32


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"_target_": "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider"},
            "'GemmaModelProvider' may com",
        ),
        ({"_target_": "a.Qwen3NextModelProvider"}, "'Qwen3NextModelProvider' may compute"),
        ({"_target_": "a.OtherGPTModelProvider"}, "'OtherGPTModelProvider' may compute"),
        ({"gated_linear_unit": False}, "activation_func 'torch.nn.functional.silu' without a gate"),
        ({"num_layers": None}, "num_layers is None"),
    ],
)
def test_entries_of_megatron_bridge_that_are_refused(tmp_path, changes, reason):
    with pytest.raises(InputError, match=reason):
        read_description(bridge(tmp_path, **changes))
    (tmp_path / "run_config.yaml").unlink()
    with pytest.raises(InputError, match=r"neither args in its common state \(common.pt, or .*\) nor run_config.yaml"):
        read_description(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ({"bias_gelu_fusion": True}, "openai_gelu", True),  # Megatron's fused GELU is the approximation
        ({}, "openai_gelu", False),
        ({"bias_gelu_fusion": True, "swiglu": True}, "openai_gelu", False),
        ({"bias_gelu_fusion": True, "add_bias_linear": False}, "openai_gelu", False),
        ({"disable_bias_linear": True}, "add_bias_linear", False),
        ({"layernorm_zero_centered_gamma": True}, "apply_layernorm_1p", True),
        ({"layernorm_epsilon": 1e-6}, "norm_epsilon", 1e-6),
        ({"group_query_attention": True, "num_query_groups": 4}, "group_query_attention", False),
        ({"use_rotary_position_embeddings": True}, "position_embedding_type", "rope"),
        ({"window_size": (7, 0), "window_attn_skip_freq": [1, 0, 1]}, "window_attn_skip_freq", "[1,0,1]"),
        ({"num_experts": 2, "moe_layer_freq": [1, 1, 1]}, "moe_layer_freq", 1),
        ({"num_experts": 2}, "moe_ffn_hidden_size", 48),
        ({"moe_router_topk": 3}, "moe_router_topk", 2),  # ignored without experts
    ],
)
def test_arguments_become_fields(arguments, field, value):
    assert getattr(read_megatron_lm({**SHAPE, **arguments}), field) == value


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type is sinkhorn"),
        ({"moe_router_load_balancing_type": ["quantile_balancing"]}, "moe_router_load_balancing_type is quantile_bal"),
        ({"moe_router_force_load_balancing": True}, "moe_router_force_load_balancing is True"),
        ({"moe_router_force_biased": -0.5}, "moe_router_force_biased is -0.5"),
        ({"moe_router_score_function": "sqrtsoftplus"}, "moe_router_score_function is 'sqrtsoftplus'"),
        ({"normalization": "OtherNorm"}, "normalization is 'OtherNorm'"),
    ],
)
def test_functions_that_this_program_lacks_are_refused(arguments, reason):
    with pytest.raises(InputError, match=reason):
        read_megatron_lm({**SHAPE, "num_experts": 4, **arguments})

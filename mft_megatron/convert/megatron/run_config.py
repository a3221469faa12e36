"""The model of a Megatron-Bridge checkpoint: section ``model`` of its ``run_config.yaml``, in Megatron-LM's words."""

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from mft_megatron.errors import InputError

RUN_CONFIG = "run_config.yaml"
# Megatron-Bridge's names of Megatron-LM's arguments, where they differ
_NAMES = {
    "num_moe_experts": "num_experts",
    "seq_length": "max_position_embeddings",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
# classes of Megatron-Bridge's models whose entries describe everything that they compute
_KNOWN_CLASSES = re.compile(
    r"GPTModel(Provider|Config)|(Code)?Llama\d*ModelProvider\w*|Qwen(2|25|3|3MoE)ModelProvider\w*|"
    r"(Mistral|Mixtral)ModelProvider\w*"
)
_ACTIVATIONS = {
    "torch.nn.functional.silu": "silu",
    "torch.nn.functional.gelu": "gelu",
    "torch._C._nn.gelu": "gelu",
    "megatron.core.activations.squared_relu": "squared_relu",
}


def read_model_section(file: Path) -> Mapping[str, object]:
    """Read the section ``model`` of ``run_config.yaml``.

    Raises:
        InputError: the file is damaged or has no such section.
    """
    try:
        content = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise InputError(f"{RUN_CONFIG} is damaged ({' '.join(str(error).split())})") from None
    section = content.get("model") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise InputError(f"{RUN_CONFIG} has no section model")
    return section


def megatron_lm_args(model: Mapping[str, object]) -> Mapping[str, object]:
    """Convert the section ``model`` to arguments of Megatron-LM.

    Raises:
        InputError: the model's class may compute what its entries do not say, or its activation cannot be expressed.
    """
    kind = str(model.get("_target_", "")).split(".")[-1]
    if not _KNOWN_CLASSES.fullmatch(kind):
        raise InputError(f"model {kind!r} may compute what its entries do not say; convert it with Megatron-Bridge")
    function = model.get("activation_func")
    function = function.get("_target_") if isinstance(function, Mapping) else function
    activation, gated = _ACTIVATIONS.get(str(function)), bool(model.get("gated_linear_unit"))
    if activation is None or gated != (activation == "silu"):
        raise InputError(f"activation_func {function!r} {'with' if gated else 'without'} a gate cannot be expressed")
    return {
        **{_NAMES.get(name, name): value for name, value in model.items()},
        "swiglu": activation == "silu",
        "squared_relu": activation == "squared_relu",
        "bias_gelu_fusion": bool(model.get("bias_activation_fusion")),
        "group_query_attention": model.get("num_query_groups") is not None,
        "untie_embeddings_and_output_weights": not model.get("share_embeddings_and_output_weights", True),
    }

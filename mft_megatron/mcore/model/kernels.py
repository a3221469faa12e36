"""The kernels of a run: attention, linear layers, fused operations and fp8, chosen and described in a line.

A kernel that a machine lacks is left out where only time is lost, and refused where the user asked for it.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from megatron.core.transformer.transformer_config import TransformerConfig

from mft_megatron.arguments.table import Arguments
from mft_megatron.mcore.adapters import nf4
from mft_megatron.mcore.attention.backends import choose, shape_of
from mft_megatron.mcore.kernels import mixed_products, triton_support
from mft_megatron.mcore.kernels.norm_triton import LONGEST_ROW
from mft_megatron.mcore.kernels.rms_norm import has_torchs_kernel
from mft_megatron.mcore.platform import devices

from . import compiler


def fusions(arguments: Arguments) -> dict[str, bool]:
    """Fields of Megatron-Core's configuration for fused operations.

    On the CPU all are off, except that gradients are not rounded to 16 bits before they are added to a sum in fp32.
    """
    wanted, sixteen_bits = arguments.fusions, arguments.precision.name != "fp32"
    return {
        "gradient_accumulation_fusion": (devices.HAS_CUDA or sixteen_bits) and wanted.gradient_accumulation_fusion,
        # the fused GELU is the tanh approximation, a different function from the one that the CPU computes
        "bias_activation_fusion": (devices.HAS_CUDA and wanted.bias_swiglu_fusion and arguments.network.swiglu),
        "bias_dropout_fusion": devices.HAS_CUDA and wanted.bias_dropout_fusion,
        # of Megatron's own attention, rotary embedding and norms, which are not used here
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }


def fp8_options(arguments: Arguments) -> dict[str, object]:
    """Fields of Megatron-Core's configuration for fp8."""
    options = arguments.transformer_engine
    if options.fp8_format is None:
        return {}
    return {
        "fp8": options.fp8_format,
        "fp8_recipe": options.fp8_recipe,
        "fp8_margin": options.fp8_margin,
        "fp8_amax_history_len": options.fp8_amax_history_len,
        "fp8_amax_compute_algo": options.fp8_amax_compute_algo,
        "fp8_wgrad": options.fp8_wgrad,
        "first_last_layers_bf16": options.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": options.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": options.num_layers_at_end_in_bf16,
    }


def describe(arguments: Arguments, config: TransformerConfig) -> str:
    """Describe the kernels of a run in a line for the log.

    Args:
        arguments: complete and checked.
        config: Megatron-Core's configuration for them.

    Raises:
        InputError: ``--attention-backend`` names a kernel that does not support this model or this machine.
    """
    attention = choose(arguments.training.attention_backend, shape_of(config, config.attention_dropout))
    linear = {"local": "Megatron-Core", "transformer_engine": "Transformer Engine"}[config.transformer_impl]
    if config.fp8:
        linear += f" in fp8 ({config.fp8}, {config.fp8_recipe})"
    not_compiled = compiler.why_not(arguments)
    names = {"bias_activation_fusion": "bias and SwiGLU", "bias_dropout_fusion": "bias and dropout"}
    fused = [words for name, words in names.items() if getattr(config, name)]
    if config.gradient_accumulation_fusion:
        fused.append(f"sums of gradients{_how_summed(arguments, config)}")
    quantized = f"; {nf4.describe()}" if arguments.lora.peft_type == "qlora" else ""
    return (
        f"{attention.describe()}{_in_triton(arguments)}; linear layers: {linear}{quantized}; "
        f"fused: {', '.join(fused) or 'nothing'}{'' if not_compiled is None else f'; {not_compiled}'}"
    )


def _in_triton(arguments: Arguments) -> str:
    """Describe what Triton's kernels compute on a GPU, or why they cannot."""
    network = arguments.network
    rope = network.position_embedding_type == "rope"
    mixed = network.apply_layernorm_1p or arguments.precision.fp32_residual_connection
    norms = mixed or (network.normalization == "RMSNorm" and not has_torchs_kernel())
    norms = norms and network.hidden_size <= LONGEST_ROW
    kinds = [name for name, used in (("rotary embedding", rope), ("norms", norms)) if used]
    if not devices.HAS_CUDA or not kinds:
        return ""
    obstacle = triton_support.obstacle(devices.device())
    how = "Triton" if obstacle is None else f"PyTorch's operators, since Triton cannot run ({obstacle})"
    return f"; {' and '.join(kinds)}: {how}"


def _how_summed(arguments: Arguments, config: TransformerConfig) -> str:
    """Describe how gradients of weights are added to sums in fp32; empty where they are in fp32 themselves."""
    precision = arguments.precision
    if precision.name == "fp32" or not precision.accumulate_allreduce_grads_in_fp32:
        return ""
    if config.transformer_impl == "transformer_engine":
        return " in fp32"
    if mixed_products.takes_apex():
        return " in fp32 (apex)"
    return f" {mixed_products.describe()}"

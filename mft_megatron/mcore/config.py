"""Megatron-Core's configuration of the model for one set of arguments and this machine."""

import warnings

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from mft_megatron.arguments import Arguments, DistributedArguments

from . import platform


def transformer_config(arguments: Arguments) -> TransformerConfig:
    """Megatron-Core's configuration for these arguments and this machine."""
    with warnings.catch_warnings():
        # it warns about its own default value of an option for CUDA graphs
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        return _transformer_config(arguments)


def _transformer_config(arguments: Arguments) -> TransformerConfig:
    network, layout = arguments.network, arguments.distributed
    return TransformerConfig(
        num_layers=network.num_layers,
        hidden_size=network.hidden_size,
        ffn_hidden_size=network.ffn_hidden_size,
        num_attention_heads=network.num_attention_heads,
        num_query_groups=network.num_query_groups,
        kv_channels=network.kv_channels,
        normalization=network.normalization,
        layernorm_epsilon=network.norm_epsilon,
        add_bias_linear=network.add_bias_linear,
        add_qkv_bias=network.add_qkv_bias,
        qk_layernorm=network.qk_layernorm,
        gated_linear_unit=network.swiglu,
        activation_func=F.silu if network.swiglu else F.gelu,
        attention_dropout=arguments.regularization.attention_dropout,
        hidden_dropout=arguments.regularization.hidden_dropout,
        init_method_std=arguments.initialization.init_method_std,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.num_virtual_stages_per_pipeline_rank,
        sequence_parallel=layout.sequence_parallel,
        bf16=arguments.precision.bf16,
        params_dtype=dtype_of(arguments),
        pipeline_dtype=dtype_of(arguments),
        # Losses carry their whole normalisation in their coefficients; Megatron is to sum and nothing else.
        calculate_per_token_loss=True,
        batch_p2p_comm=batches_p2p(layout),
        overlap_p2p_comm=layout.interleaved,
        attention_backend=AttnBackend.local,
        # weights are drawn by initialize_weights, the same for every layout
        perform_initialization=False,
        use_cpu_initialization=not platform.HAS_CUDA,
        # fusions that need CUDA kernels of Transformer Engine or apex
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # the fused GELU is the tanh approximation: another function than the CPU computes
        bias_activation_fusion=platform.HAS_CUDA and network.swiglu,
        bias_dropout_fusion=platform.HAS_CUDA,
    )


def dtype_of(arguments: Arguments) -> torch.dtype:
    """Of weights and activations."""
    return torch.bfloat16 if arguments.precision.bf16 else torch.float32


def batches_p2p(layout: DistributedArguments) -> bool:
    """Whether ranks of a pipeline exchange tensors as one batch of sends and receives.

    Never between interleaved stages: at pipeline size 2 the rank before is also the rank after, messages in the two
    directions are taken for each other, and the numbers are silently wrong.
    """
    return not layout.interleaved and platform.backend(layout.distributed_backend) != "gloo"

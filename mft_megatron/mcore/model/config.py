"""Megatron-Core's ``TransformerConfig`` for one set of arguments and this machine."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mft_megatron.arguments.groups.distributed import DistributedArguments
from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.arguments.stages import layout_stages
from mft_megatron.arguments.table import Arguments
from mft_megatron.arguments.values.layer_pattern import numbers_of
from mft_megatron.mcore.moe.experts import expert_options
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.precisions import DTYPES

from .kernels import fp8_options, fusions
from .recompute import recompute_options
from .residual import residual_options
from .rope_frequencies import softmax_scale


def transformer_config(arguments: Arguments) -> TransformerConfig:
    """Build Megatron-Core's configuration for these arguments and this machine."""
    with warnings.catch_warnings():
        # Megatron-Core warns about its own default value of an option for CUDA graphs
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        # it advises against recomputing core attention, which the user asked for
        warnings.filterwarnings("ignore", message="If you are using transformer_engine as the transformer")
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
        layernorm_zero_centered_gamma=network.apply_layernorm_1p,
        rotary_interleaved=network.rotary_interleaved,
        add_bias_linear=network.add_bias_linear,
        add_qkv_bias=network.qkv_bias,
        qk_layernorm=network.qk_layernorm,
        gated_linear_unit=network.gated,
        activation_func=activation(network),
        softmax_scale=softmax_scale(network.kv_channels, network.scaling),
        attention_dropout=arguments.regularization.attention_dropout,
        hidden_dropout=arguments.regularization.hidden_dropout,
        init_method_std=arguments.initialization.init_method_std,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.num_virtual_stages_per_pipeline_rank,
        context_parallel_size=layout.context_parallel_size,
        num_layers_in_first_pipeline_stage=layout.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=layout.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=layout.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=layout.account_for_loss_in_pipeline_split,
        pipeline_model_parallel_layout=pipeline_layout(layout),
        sequence_parallel=layout.sequence_parallel,
        deterministic_mode=devices.HAS_CUDA and arguments.training.deterministic_mode,
        window_size=None if network.window is None else (network.window, 0),
        window_attn_skip_freq=numbers_of(network.window_attn_skip_freq),
        bf16=arguments.precision.bf16,
        fp16=arguments.precision.fp16,
        params_dtype=dtype_of(arguments),
        **residual_options(arguments),
        # the coefficients of the losses hold the whole normalisation; Megatron must only sum
        calculate_per_token_loss=True,
        batch_p2p_comm=batches_p2p(layout),
        # Each message is waited for on its stream. The device-wide wait after it was for torch before 1.13.
        batch_p2p_sync=False,
        overlap_p2p_comm=layout.interleaved,
        # sets the environment variables by which Transformer Engine chooses kernels; no other kernel reads them
        attention_backend=AttnBackend.fused if arguments.training.attention_backend == "fused" else AttnBackend.local,
        transformer_impl=arguments.transformer_engine.transformer_impl,
        **fp8_options(arguments),
        **recompute_options(arguments.recompute),
        **expert_options(arguments),
        # initialize_weights initialises weights, the same on every parallel layout
        perform_initialization=False,
        use_cpu_initialization=not devices.HAS_CUDA,
        **fusions(arguments),
    )


def pipeline_layout(layout: DistributedArguments) -> list[list[str]] | None:
    """Contents of each pipeline stage in Megatron-Core's words; it would parse the option's text differently."""
    text = layout.pipeline_model_parallel_layout
    if text is None:
        return None
    words = {"E": "embedding", "t": "decoder", "L": "loss"}
    return [[words[letter] for letter in stage] for stage in layout_stages(text)]


def activation(network: NetworkArguments) -> Callable[[Tensor], Tensor]:
    """Activation function of the MLP, or of its gate."""
    if network.swiglu:
        return F.silu
    if network.squared_relu:
        return squared_relu
    return tanh_gelu if network.openai_gelu else F.gelu


def tanh_gelu(hidden: Tensor) -> Tensor:
    """Compute GELU by its tanh approximation, elementwise; differs from the exact one by up to 5e-4."""
    return F.gelu(hidden, approximate="tanh")


def dtype_of(arguments: Arguments) -> torch.dtype:
    """Dtype of weights and activations."""
    return DTYPES[arguments.precision.name]


def batches_p2p(layout: DistributedArguments) -> bool:
    """Whether ranks of a pipeline exchange tensors as one batch of sends and receives.

    Never between interleaved stages: at pipeline size 2 the previous rank is also the next rank, messages in the two
    directions are confused, and the results are silently wrong.
    """
    return not layout.interleaved and devices.backend(layout.distributed_backend) != "gloo"

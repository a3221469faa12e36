"""A mixture of experts in a step: configuration, rows of tokens, marks of weights, losses over all ranks."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from mft_megatron.arguments.table import Arguments
from mft_megatron.errors import InputError
from mft_megatron.mcore.parallel.device_batch import DeviceBatch
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.megatron_fixes import reset_expert_loss_scale

from .router import BALANCING_LOSSES, Z_LOSS, PackedRouter


def expert_options(arguments: Arguments) -> dict[str, Any]:
    """Fields of Megatron-Core's ``TransformerConfig`` for experts; empty for a model without any.

    Raises:
        InputError: the dispatcher needs a collective that gloo does not have.
    """
    network, moe, layout = arguments.network, arguments.moe, arguments.distributed
    if network.num_experts is None:
        return {}
    expert_tensor_size = layout.expert_tensor_parallel_size or layout.tensor_model_parallel_size
    sends = moe.moe_token_dispatcher_type == "alltoall" and layout.expert_model_parallel_size > 1
    if sends and expert_tensor_size > 1 and devices.backend(layout.distributed_backend) == "gloo":
        raise InputError(
            f"--moe-token-dispatcher-type alltoall where {expert_tensor_size} ranks split each expert: those gather "
            "different numbers of tokens, which gloo cannot; give --expert-tensor-parallel-size 1, or take allgather"
        )
    kinds, factors = list(moe.moe_router_load_balancing_type), list(moe.moe_aux_loss_coeff)
    single = len(kinds) == 1
    frequency = network.moe_layer_freq
    factor = moe.moe_expert_capacity_factor
    return {
        "num_moe_experts": network.num_experts,
        "moe_layer_freq": frequency if isinstance(frequency, int) else [int(has) for has in network.expert_layers],
        "moe_ffn_hidden_size": network.moe_ffn_hidden_size,
        "moe_router_topk": network.moe_router_topk,
        "moe_router_pre_softmax": network.moe_router_pre_softmax,
        "moe_router_score_function": network.moe_router_score_function,
        "moe_router_topk_scaling_factor": network.moe_router_topk_scaling_factor,
        "moe_router_num_groups": network.moe_router_num_groups,
        "moe_router_group_topk": network.moe_router_group_topk,
        "moe_router_enable_expert_bias": network.moe_router_enable_expert_bias,
        "moe_shared_expert_intermediate_size": network.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": network.moe_shared_expert_gate,
        "moe_router_load_balancing_type": kinds[0] if single else kinds,
        "moe_aux_loss_coeff": factors[0] if single else factors,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff,
        "moe_input_jitter_eps": moe.moe_input_jitter_eps,
        # With adapters the biases are part of the frozen model, and checkpoints of adapters do not contain them.
        "moe_router_bias_update_rate": 0.0 if arguments.adapters is not None else moe.moe_router_bias_update_rate,
        "moe_router_dtype": moe.moe_router_dtype,
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type,
        "moe_expert_capacity_factor": None if factor is None or factor < 0 else factor,
        "moe_pad_expert_input_to_capacity": moe.moe_pad_expert_input_to_capacity,
        "moe_token_drop_policy": moe.moe_token_drop_policy,
        "moe_shared_expert_overlap": moe.moe_shared_expert_overlap,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
    }


def rows_of_tokens(batch: DeviceBatch, sequence_parallel: bool) -> Tensor:
    """Find the row of each of this rank's tokens, for its routers.

    Args:
        batch: on this process's device.
        sequence_parallel: whether tensor-parallel ranks have different tokens.

    Returns:
        bool [B, tokens of this rank], whether a token belongs to a row; padding belongs to none.
    """
    rows, width = batch.tokens_BS.shape
    device = batch.position_ids_BS.device
    row_B1 = torch.arange(rows, device=device)[:, None]
    row_BS = row_B1.expand(rows, width)
    if batch.lengths_B is not None:
        position_S = torch.arange(width, device=device)
        row_BS = row_BS.masked_fill(position_S >= batch.lengths_B[:, None], -1)
    row_T = batch.shard.take(row_BS)
    if sequence_parallel:
        row_T = row_T.chunk(parallel_state.get_tensor_model_parallel_world_size())[
            parallel_state.get_tensor_model_parallel_rank()
        ]
    return row_T == row_B1


def mark_expert_weights(model: torch.nn.Module) -> None:
    """Mark the weights of experts, so that their gradients are reduced, and their norms summed, over experts' groups.

    Megatron marks them only under expert parallelism. Experts that are split over another number of tensor-parallel
    ranks than the rest have other groups as well; without the mark their gradients would lack other ranks' parts.
    """
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    same_split = parallel_state.get_expert_tensor_parallel_world_size() == tensor_size
    if same_split and parallel_state.get_expert_model_parallel_world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False


def routers(chunks: Iterable[torch.nn.Module]) -> Iterator[PackedRouter]:
    """Yield the routers of this rank's layers."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, PackedRouter))


def loss_names(arguments: Arguments) -> list[str]:
    """Names, in the log, of the losses of experts that the run has."""
    moe = arguments.moe
    if arguments.network.num_experts is None:
        return []
    balancing = zip(moe.moe_router_load_balancing_type, moe.moe_aux_loss_coeff, strict=True)
    names = [BALANCING_LOSSES[kind] for kind, factor in balancing if kind in BALANCING_LOSSES and factor > 0]
    return [*names, *([Z_LOSS] if moe.moe_z_loss_coeff else [])]


def begin_step(chunks: Iterable[torch.nn.Module], num_micro_batches: float) -> None:
    """Prepare the routers for a step.

    ``num_micro_batches`` counts those of all data-parallel ranks; where rows are empty, as many as the others fill.
    """
    reset_expert_loss_scale()
    for router in routers(chunks):
        router.begin_step(1 / num_micro_batches)


def biases(chunks: Iterable[torch.nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """The biases by which routers balance experts, each with a copy: Megatron-Core changes them with the gradients."""
    found = (router.expert_bias for router in routers(chunks) if router.enable_expert_bias)
    return [(bias, bias.clone()) for bias in found if bias is not None]


def losses_of_step(chunks: Iterable[torch.nn.Module], arguments: Arguments) -> dict[str, Tensor]:
    """Sum the balancing and z losses of the step over all ranks; the same on every rank.

    Returns:
        by name fp64 [layers], means over the step without coefficient, NaN for layers without experts; empty for a
        model without such losses.
    """
    names, num_layers = loss_names(arguments), len(arguments.network.expert_layers)
    if not names:
        return {}
    values = torch.zeros(len(names), num_layers, dtype=torch.float64, device=devices.device())
    for router in routers(chunks):
        for index, name in enumerate(names):
            if name in router.losses:
                values[index, router.layer_number - 1] += router.losses[name]
    dist.all_reduce(values)
    for index, has_experts in enumerate(arguments.network.expert_layers):
        if not has_experts:
            values[:, index] = torch.nan
    return dict(zip(names, values, strict=True))

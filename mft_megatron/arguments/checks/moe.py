"""Check the mixture of experts."""

import dataclasses

from mft_megatron.arguments.groups.moe import MoEArguments
from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.options import spelling


def check_experts(a: Arguments) -> str | None:
    """Check the shape of the experts and their router."""
    n = a.network
    if n.num_experts is None:
        return _without_experts(a)
    if len(n.expert_layers) != n.num_layers:
        return (
            f"--moe-layer-freq {n.moe_layer_freq} names {len(n.expert_layers)} layers, --num-layers is {n.num_layers}; "
            "give one number for each layer"
        )
    if not any(n.expert_layers):
        return f"--moe-layer-freq {n.moe_layer_freq}: no layer has experts; leave out --num-experts"
    if n.moe_router_topk > n.num_experts:
        return f"--moe-router-topk {n.moe_router_topk} is more than --num-experts {n.num_experts}; lower it"
    sinkhorn = "sinkhorn" in a.moe.moe_router_load_balancing_type
    if (
        n.moe_router_topk == 1
        and n.moe_router_score_function == "softmax"
        and not (n.moe_router_pre_softmax or sinkhorn)
    ):
        return (
            "--moe-router-topk 1: a softmax over one chosen expert is always 1 and the router would learn nothing; add "
            "--moe-router-pre-softmax"
        )
    if n.moe_router_score_function == "sigmoid" and n.moe_router_pre_softmax:
        return "--moe-router-pre-softmax has no effect with --moe-router-score-function sigmoid; leave it out"
    if n.moe_router_enable_expert_bias and n.moe_router_score_function != "sigmoid":
        return "--moe-router-enable-expert-bias goes with --moe-router-score-function sigmoid; add that"
    if n.moe_shared_expert_gate and n.moe_shared_expert_intermediate_size is None:
        return (
            "--moe-shared-expert-gate without --moe-shared-expert-intermediate-size has nothing to gate; leave it out"
        )
    tp = a.distributed.tensor_model_parallel_size
    if n.moe_shared_expert_intermediate_size is not None and n.moe_shared_expert_intermediate_size % tp:
        return (
            f"--tensor-model-parallel-size {tp} does not divide --moe-shared-expert-intermediate-size "
            f"{n.moe_shared_expert_intermediate_size}"
        )
    if n.add_bias_linear:
        return "--num-experts: experts have no bias; add --disable-bias-linear"
    if n.add_mlp_bias:
        return "--num-experts: experts have no bias; leave --add-mlp-bias out"
    return _groups_problem(n, n.num_experts)


def check_routing(a: Arguments) -> str | None:
    """Check the load balancing of experts, and how tokens are dispatched to them."""
    m, n = a.moe, a.network
    if n.num_experts is None:
        return None
    kinds, factors = m.moe_router_load_balancing_type, m.moe_aux_loss_coeff
    if len(set(kinds)) != len(kinds):
        return f"--moe-router-load-balancing-type {' '.join(kinds)}: one of them twice; leave it out once"
    if len(kinds) > 1 and {"none", "sinkhorn"} & set(kinds):
        return f"--moe-router-load-balancing-type {' '.join(kinds)}: none and sinkhorn stand alone"
    if len(factors) != len(kinds):
        return (
            f"--moe-aux-loss-coeff has {len(factors)} numbers, --moe-router-load-balancing-type {len(kinds)} names; "
            "give as many"
        )
    for factor in factors:
        if not 0 <= factor < float("inf"):
            return f"--moe-aux-loss-coeff {factor}: must be at least 0 and finite"
    if kinds[0] in ("none", "sinkhorn") and factors[0]:
        return f"--moe-aux-loss-coeff {factors[0]} has no effect with --moe-router-load-balancing-type {kinds[0]}"
    if m.moe_token_dispatcher_type == "flex":
        return "--moe-token-dispatcher-type flex needs DeepEP, which is not supported; use alltoall"
    if m.moe_grouped_gemm:
        return "--moe-grouped-gemm is not supported: experts are computed one by one; leave it out"
    if m.moe_permute_fusion:
        return "--moe-permute-fusion needs Transformer Engine's kernels, which are not supported here; leave it out"
    if m.moe_shared_expert_overlap and n.moe_shared_expert_intermediate_size is None:
        return "--moe-shared-expert-overlap without --moe-shared-expert-intermediate-size has no effect; leave it out"
    if m.moe_shared_expert_overlap and m.moe_token_dispatcher_type != "alltoall":
        return "--moe-shared-expert-overlap needs --moe-token-dispatcher-type alltoall; add that"
    return _capacity_problem(m)


def _without_experts(a: Arguments) -> str | None:
    for group, values in ((NetworkArguments, a.network), (MoEArguments, a.moe)):
        for field in dataclasses.fields(group):
            if field.name.startswith("moe_") and getattr(values, field.name) != field.default:
                return f"{spelling(field)} has no effect without --num-experts; add that, or leave it out"
    return None


def _groups_problem(n: NetworkArguments, num_experts: int) -> str | None:
    groups, chosen = n.moe_router_num_groups, n.moe_router_group_topk
    if groups is None and chosen is None:
        return None
    if groups is None or chosen is None:
        return "--moe-router-num-groups and --moe-router-group-topk go together; give both or neither"
    if num_experts % groups:
        return f"--moe-router-num-groups {groups} does not divide --num-experts {num_experts}"
    if chosen > groups:
        return f"--moe-router-group-topk {chosen} is more than --moe-router-num-groups {groups}; lower it"
    if n.moe_router_topk % chosen:
        return f"--moe-router-group-topk {chosen} does not divide --moe-router-topk {n.moe_router_topk}"
    if n.moe_router_topk > chosen * (num_experts // groups):
        return (
            f"--moe-router-topk {n.moe_router_topk} is more than the {chosen * (num_experts // groups)} experts of "
            f"--moe-router-group-topk {chosen} groups; raise the latter"
        )
    return None


def _capacity_problem(m: MoEArguments) -> str | None:
    limited = m.moe_expert_capacity_factor is not None and m.moe_expert_capacity_factor >= 0
    if m.moe_expert_capacity_factor == 0:
        return "--moe-expert-capacity-factor 0: no expert would take a token; give a number above 0, or a negative one"
    if not limited and m.moe_pad_expert_input_to_capacity:
        return "--moe-pad-expert-input-to-capacity needs --moe-expert-capacity-factor; add that"
    if limited and m.moe_router_load_balancing_type == ("sinkhorn",):
        return "--moe-expert-capacity-factor does not go with --moe-router-load-balancing-type sinkhorn; use a loss"
    return None

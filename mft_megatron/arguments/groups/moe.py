"""Mixture of experts: load balancing and dispatch of tokens. The shape of experts is in :mod:`.network`."""

import dataclasses

from mft_megatron.options import option

BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none")


@dataclasses.dataclass(frozen=True)
class MoEArguments:
    """Only with --num-experts. Padding does not count in balancing losses or in the capacity of experts."""

    moe_router_load_balancing_type: tuple[str, ...] = option(
        ("aux_loss",),
        "How the load of experts is balanced. aux_loss: a loss on the loads within a micro-batch, so it depends on "
        "--micro-batch-size. seq_aux_loss: on the loads within each pack; the same on every parallel layout. "
        "global_aux_loss: on the loads of all data-parallel ranks in the step so far; unlike in Megatron it does not "
        "get weaker with their number. sinkhorn: no loss, Sinkhorn's algorithm distributes the tokens of a rank. "
        "Several losses may be given, with as many --moe-aux-loss-coeff.",
        choices=BALANCING,
    )
    moe_aux_loss_coeff: tuple[float, ...] = option(
        (0.0,),
        "Factor of the balancing loss, which is averaged over micro-batches and summed over layers; 1e-2 is a good "
        "start.",
    )
    moe_z_loss_coeff: float | None = option(
        None,
        "Factor of a loss that keeps the router's scores small, averaged over packs and summed over layers; 1e-3 is "
        "a good start.",
        at_least=0,
    )
    moe_input_jitter_eps: float | None = option(
        None, "Scale the router's input by random numbers from 1 - X to 1 + X.", above=0, below=1
    )
    moe_router_bias_update_rate: float = option(
        1e-3, "Step of the biases of --moe-router-enable-expert-bias.", at_least=0
    )
    moe_router_dtype: str | None = option(
        None,
        "Precision of routing and of the sum of experts' outputs. Not given: that of the model.",
        choices=("fp32", "fp64"),
    )
    moe_token_dispatcher_type: str = option(
        "allgather",
        "How tokens are sent to experts of other ranks: every rank gets all tokens (allgather), or only the ranks "
        "that need a token get it (alltoall). Padded data sets (--padding-mode padding) with "
        "--expert-model-parallel-size need alltoall. flex is refused: it needs DeepEP.",
        choices=("allgather", "alltoall", "flex"),
    )
    moe_grouped_gemm: bool = option(
        False, "Refused: experts are computed one by one; computing them together needs a grouped-GEMM library."
    )
    moe_expert_capacity_factor: float | None = option(
        None,
        "An expert takes at most this many times the mean number of tokens, counted by rank and micro-batch, so the "
        "result depends on the parallel layout; further tokens are dropped. Negative or not given: no limit.",
    )
    moe_pad_expert_input_to_capacity: bool = option(
        False, "Give every expert exactly as many tokens as --moe-expert-capacity-factor allows."
    )
    moe_token_drop_policy: str = option(
        "probs",
        "Which tokens a full expert drops: those with the lowest probability, or the last.",
        choices=("probs", "position"),
    )
    moe_shared_expert_overlap: bool = option(
        False, "Compute shared experts while tokens are sent, with --moe-token-dispatcher-type alltoall."
    )
    moe_permute_fusion: bool = option(
        False, "Refused: sorting tokens by expert in one kernel needs Transformer Engine's layers."
    )
    moe_per_layer_logging: bool = option(False, "Also log balancing and z losses of each layer.")

"""The router of a mixture of experts, and the losses that balance the load of its experts.

::

    hidden states ─► logits [T, experts] ─► probabilities, chosen experts ─► dispatcher
                          │                        │
                     z loss               balancing losses: by micro-batch, by row, by step

Megatron-Core's router does not suit packs and padding: it takes the batch size as the number of rows, divides by the
tokens of a rank, and multiplies losses by a number of tokens that it expects to divide by in the end. So the losses are
computed here, from sums by row: a token's row is a column of ``rows``, padding has none. They are attached to the graph
as Megatron does it (``MoEAuxLossAutoScaler``: gradient 1, times the loss scale).

With E experts, k of them chosen for each token, ``n`` tokens, ``c_e`` of which chose expert e, and ``p_e`` the sum of
their probabilities of e, a balancing loss is ``E / (k n²) · Σ_e c_e p_e``: 1 for even loads.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    sinkhorn,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mft_megatron.mcore.kernels.rms_norm import widened
from mft_megatron.mcore.platform.megatron_fixes import define_te_general_gemm

define_te_general_gemm()

# by kind of balancing, Megatron's name of its loss in the log
BALANCING_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
Z_LOSS = "z_loss"


class PackedRouter(TopKRouter):
    """Megatron-Core's router with losses over the real tokens of whole packs.

    Attributes:
        micro_batch_weight: of a micro-batch's losses in the step: 1 / micro-batches of all data-parallel ranks.
        losses: by name, this rank's part of their means over the step, fp32 scalars without coefficient.
        coefficients: by kind of balancing.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, **options: Any):
        # since 0.17 the options say whether the layer is one of multi-token prediction
        super().__init__(config=config, pg_collection=pg_collection, **options)
        self.micro_batch_weight = 1.0
        self.losses: dict[str, Tensor] = {}
        self._load_of_step: Tensor | None = None
        kinds, factors = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
        if not isinstance(kinds, list):
            kinds, factors = [kinds], [factors]
        self.coefficients = {
            kind: factor for kind, factor in zip(kinds, factors, strict=True) if kind in BALANCING_LOSSES and factor > 0
        }

    def begin_step(self, micro_batch_weight: float) -> None:
        """Reset losses and loads of the last step; the weight is described at the class."""
        self.micro_batch_weight = micro_batch_weight
        self.losses = {}
        self._load_of_step = None

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedRouter":
        """Convert weights for ``Module.to``, but keep biases and counts of experts in fp32: in bf16 256 + 1 is 256."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(function, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts for each token, and attach the losses to the graph.

        Args:
            logits: [T, 1, experts], of this rank's tokens.
            padding_mask: Megatron's name; here the rows, bool [T, B]: whether a token belongs to a row; padding belongs
                to none. ``None``: one row of all tokens.

        Returns:
            probabilities [T, experts], 0 for experts that were not chosen, and bool [T, experts], whether they were.
        """
        logits = logits.view(-1, self.num_experts)
        if padding_mask is None:
            padding_mask = torch.ones(len(logits), 1, dtype=torch.bool, device=logits.device)
        rows_TB = padding_mask
        real_T1 = rows_TB.any(1, keepdim=True)
        learning = self.training and torch.is_grad_enabled()
        if learning and self.config.moe_z_loss_coeff:
            logits = self._with_z_loss(logits, rows_TB)
        probabilities, chosen = self._route(logits, real_T1)
        if self.config.moe_expert_capacity_factor is not None:
            # Padding must not use up the capacity of experts.
            probabilities, chosen = apply_router_token_dropping(
                probabilities * real_T1,
                chosen & real_T1,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        if learning and self.coefficients:
            probabilities = self._with_balancing_losses(probabilities, logits, rows_TB)
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += (chosen & real_T1).sum(0)
        return probabilities, chosen

    def _route(self, logits: Tensor, real_T1: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts by [T, experts] logits; returns probabilities and the choice, both [T, experts].

        ``real_T1``: bool, whether a token is no padding.
        """
        if self.routing_type == "sinkhorn":
            return self._route_by_sinkhorn(logits, real_T1)
        return topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
        )

    def _route_by_sinkhorn(self, logits: Tensor, real_T1: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts by Sinkhorn's balanced assignment of the real tokens; in evaluation by the scores."""
        probabilities = torch.sigmoid(logits) if self.topk == 1 else logits.softmax(-1, torch.float32).type_as(logits)
        with torch.no_grad():
            scores = probabilities
            if self.training:
                scores = sinkhorn(logits.float().masked_fill(~real_T1, -torch.inf))
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, scores.topk(self.topk, dim=1).indices, True)
        return probabilities * chosen, chosen

    def _with_z_loss(self, logits: Tensor, rows_TB: Tensor) -> Tensor:
        """Attach the z loss to [T, experts] logits, as the mean over rows of each row's mean.

        So it does not depend on which rows are in the same micro-batch. ``rows_TB``: bool, as in :meth:`routing`.
        """
        squares = torch.logsumexp(widened(logits), dim=-1).square()
        rows_BT = rows_TB.t().to(squares.dtype)
        tokens_B = self._summed(rows_BT.sum(1), self.tp_cp_group)
        value = (rows_BT @ squares / tokens_B.clamp(min=1)).mean()
        return self._attached(logits, Z_LOSS, value, self.config.moe_z_loss_coeff, self.micro_batch_weight)

    def _with_balancing_losses(self, probabilities: Tensor, logits: Tensor, rows_TB: Tensor) -> Tensor:
        """Attach the balancing losses to [T, experts] probabilities.

        They are those of the choice and the probabilities without bias, groups and capacity. ``rows_TB``: bool, as in
        :meth:`routing`.
        """
        chosen, scores = compute_routing_scores_for_aux_loss(widened(logits), self.topk, self.score_function)
        rows_BT = rows_TB.t().to(scores.dtype)
        scores_BE = rows_BT @ scores
        with torch.no_grad():
            # The last column counts tokens.
            local_BE1 = torch.cat([rows_BT @ chosen.to(scores.dtype), rows_BT.sum(1, keepdim=True)], dim=1)
            counts_BE1 = self._summed(local_BE1, self.tp_cp_group)
        counts_E1, scores_E = counts_BE1.sum(0), scores_BE.sum(0)
        for kind, coefficient in self.coefficients.items():
            weight = self.micro_batch_weight
            if kind == "seq_aux_loss":
                value = self._balance(counts_BE1, counts_BE1[:, -1:], scores_BE).mean()
            elif kind == "aux_loss":
                value = self._balance(counts_E1, counts_E1[-1:], scores_E)
            else:
                # Each data-parallel rank has a part of one loss, not a loss of which the mean is taken.
                data_size = self.tp_dp_cp_group.size() // self.tp_cp_group.size()
                value, weight = self._balance_of_step(local_BE1.sum(0), scores_E), weight * data_size
            probabilities = self._attached(probabilities, BALANCING_LOSSES[kind], value, coefficient, weight)
        return probabilities

    def _balance_of_step(self, local_E1: Tensor, scores_E: Tensor) -> Tensor:
        """Balancing loss with the loads of all tokens of the step so far, of all data-parallel ranks.

        Args:
            local_E1: [experts + 1], this rank's tokens that chose an expert, and tokens.
            scores_E: [experts], sums over this rank's tokens.
        """
        now = self._summed(local_E1, self.tp_dp_cp_group)
        self._load_of_step = now if self._load_of_step is None else self._load_of_step + now
        return self._balance(self._load_of_step, now[-1:], scores_E)

    def _balance(self, counts: Tensor, tokens: Tensor, scores: Tensor) -> Tensor:
        """Balancing loss of each of some rows, or of all tokens: fp32 of the leading dimensions.

        Args:
            counts: [..., experts + 1]: tokens that chose an expert, and tokens.
            tokens: [..., 1]: tokens of all ranks over which ``scores`` are summed.
            scores: [..., experts]: sums of probabilities over this rank's tokens.
        """
        parts = counts[..., :-1] / counts[..., -1:].clamp(min=1) * scores / tokens.clamp(min=1)
        return parts.sum(-1) * (self.num_experts / self.topk)

    def _attached(self, activation: Tensor, name: str, value: Tensor, coefficient: float, weight: float) -> Tensor:
        """Return ``activation``, whose backward pass adds the gradient of ``coefficient · weight · value``.

        ``value``: a scalar, without coefficient; it is logged under ``name``.
        """
        self.losses[name] = self.losses.get(name, 0.0) + value.detach().float() * weight
        # A tensor of one element, like the loss scale that it is multiplied by.
        return MoEAuxLossAutoScaler.apply(activation, (value * (coefficient * weight)).reshape(1))

    @staticmethod
    def _summed(value: Tensor, group: dist.ProcessGroup) -> Tensor:
        if group.size() == 1:
            return value
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

"""The router of a mixture of experts, and what keeps its experts evenly loaded.

::

    hidden states ─► logits [T, experts] ─► probabilities, which experts ─► dispatcher
                          │                        │
                     z loss               balancing losses: by micro-batch, by row, by step

Megatron-Core's router knows neither packs nor padding well: it takes the batch size for the number of rows, divides by
the tokens of a rank, and multiplies losses by a number of tokens that it expects to be divided by in the end. So
the losses are computed here, from sums by row: a token's row is a column of ``rows``, padding has none. They are
attached to the graph as Megatron does it (``MoEAuxLossAutoScaler``: gradient 1, times the loss scale).

With E experts, k of them chosen for each token, ``n`` tokens, ``c_e`` of which chose expert e, and ``p_e`` the sum of
their probabilities of e, a balancing loss is ``E / (k n²) · Σ_e c_e p_e``: 1 for even loads.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    sinkhorn,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from mft_megatron.mcore.platform.megatron_fixes import define_te_general_gemm

define_te_general_gemm()

# what each kind of balancing is called in the log, Megatron's names
BALANCING_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
Z_LOSS = "z_loss"


class PackedRouter(TopKRouter):
    """Megatron-Core's router with losses over the real tokens of whole packs.

    ``share``: what a micro-batch's losses count in the step, one over all micro-batches of all data-parallel ranks.
    ``losses``: by name, this rank's part of their means over the step, fp32 without coefficient; see :mod:`.experts`.
    """

    def __init__(self, config, pg_collection=None):
        super().__init__(config=config, pg_collection=pg_collection)
        self.share = 1.0
        self.losses: dict[str, Tensor] = {}
        self._load_of_step: Tensor | None = None
        kinds, factors = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
        if not isinstance(kinds, list):
            kinds, factors = [kinds], [factors]
        self.coefficients = {
            kind: factor for kind, factor in zip(kinds, factors, strict=True) if kind in BALANCING_LOSSES and factor > 0
        }

    def begin_step(self, share: float) -> None:
        """Forget the last step; ``share``: see the class."""
        self.share = share
        self.losses = {}
        self._load_of_step = None

    def _apply(self, function, recurse=True):
        """Biases and counts of experts stay fp32 where weights are converted; in bf16 256 + 1 is 256."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(function, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Which experts each token goes to.

        Args:
            logits: [T, 1, experts], of this rank's tokens.
            padding_mask: Megatron's name; here the rows, bool [T, B]: True where a token belongs to a row, nowhere for
                padding. ``None``: one row of all tokens.

        Returns:
            probabilities [T, experts], 0 for experts that were not chosen, and whether they were, bool.
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
            # padding takes no one's place
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
        """While training the choice is made by what balances the loads, padding left out."""
        probabilities = torch.sigmoid(logits) if self.topk == 1 else logits.softmax(-1, torch.float32).type_as(logits)
        with torch.no_grad():
            scores = probabilities
            if self.training:
                scores = sinkhorn(logits.float().masked_fill(~real_T1, -torch.inf))
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, scores.topk(self.topk, dim=1).indices, True)
        return probabilities * chosen, chosen

    def _with_z_loss(self, logits: Tensor, rows_TB: Tensor) -> Tensor:
        """With the mean over rows of each row's mean, so that it does not matter which rows share a micro-batch."""
        squares = torch.logsumexp(at_least_fp32(logits), dim=-1).square()
        rows_BT = rows_TB.t().to(squares.dtype)
        tokens_B = self._summed(rows_BT.sum(1), self.tp_cp_group)
        value = (rows_BT @ squares / tokens_B.clamp(min=1)).mean()
        return self._attached(logits, Z_LOSS, value, self.config.moe_z_loss_coeff, self.share)

    def _with_balancing_losses(self, probabilities: Tensor, logits: Tensor, rows_TB: Tensor) -> Tensor:
        # the choice and the probabilities as they are without bias, groups and limits
        chosen, scores = compute_routing_scores_for_aux_loss(at_least_fp32(logits), self.topk, self.score_function)
        rows_BT = rows_TB.t().to(scores.dtype)
        scores_BE = rows_BT @ scores
        with torch.no_grad():
            # the last column counts tokens
            own_BE1 = torch.cat([rows_BT @ chosen.to(scores.dtype), rows_BT.sum(1, keepdim=True)], dim=1)
            counts_BE1 = self._summed(own_BE1, self.tp_cp_group)
        counts_E1, scores_E = counts_BE1.sum(0), scores_BE.sum(0)
        for kind, coefficient in self.coefficients.items():
            share = self.share
            if kind == "seq_aux_loss":
                value = self._balance(counts_BE1, counts_BE1[:, -1:], scores_BE).mean()
            elif kind == "aux_loss":
                value = self._balance(counts_E1, counts_E1[-1:], scores_E)
            else:
                # each data-parallel rank has a part of the loss, not a loss of its own
                data_size = self.tp_dp_cp_group.size() // self.tp_cp_group.size()
                value, share = self._balance_of_step(own_BE1.sum(0), scores_E), share * data_size
            probabilities = self._attached(probabilities, BALANCING_LOSSES[kind], value, coefficient, share)
        return probabilities

    def _balance_of_step(self, own_E1: Tensor, scores_E: Tensor) -> Tensor:
        """With the loads of all tokens of the step so far, of all data-parallel ranks."""
        now = self._summed(own_E1, self.tp_dp_cp_group)
        self._load_of_step = now if self._load_of_step is None else self._load_of_step + now
        return self._balance(self._load_of_step, now[-1:], scores_E)

    def _balance(self, counts: Tensor, tokens: Tensor, scores: Tensor) -> Tensor:
        """The balancing loss of some rows each, or of some tokens.

        Args:
            counts: [..., experts + 1]: tokens that chose an expert, and tokens.
            tokens: [..., 1]: how many ``scores`` are the sum of, over all ranks.
            scores: [..., experts], of this rank's tokens.
        """
        parts = counts[..., :-1] / counts[..., -1:].clamp(min=1) * scores / tokens.clamp(min=1)
        return parts.sum(-1) * (self.num_experts / self.topk)

    def _attached(self, activation: Tensor, name: str, value: Tensor, coefficient: float, share: float) -> Tensor:
        """``activation``, whose backward pass adds the gradient of ``coefficient · share · value``."""
        self.losses[name] = self.losses.get(name, 0.0) + value.detach().float() * share
        # a tensor of one element: the scale it is multiplied by has one, too
        return MoEAuxLossAutoScaler.apply(activation, (value * (coefficient * share)).reshape(1))

    @staticmethod
    def _summed(value: Tensor, group: dist.ProcessGroup) -> Tensor:
        if group.size() == 1:
            return value
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total


def at_least_fp32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()

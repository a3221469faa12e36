"""Output layer and cross entropy in one, which never hold more logits than those of a block of tokens.

::

    hidden [N, H] ─► a block [C, H] ─► logits [C, V] ─► maximum, Σ exp, label's logit ─► over ranks ─► losses [C]
                                             └─► slope · (softmax - one-hot) ─► gradient of hidden [C, H]
                                                                             └─► added to the weight's gradient [V, H]

``N`` supervised tokens, ``C`` tokens of a block, ``V`` rows of the output weight on this tensor-parallel rank, ``H``
hidden size. Where ``dL/dl_t``, the *slope*, is known in the forward pass, the lower line runs there, on the logits that
have just been computed; otherwise the backward pass computes the logits a second time, block by block.

Of 16-bit hidden states the logits are in fp32 as the product gives them (``kernels/mixed_products.py``). Rounded to 16
bits are their gradients, as factors of the two products after them, and the gradient of the hidden states, once. How
many tokens a block has is in :mod:`.logit_blocks`.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mft_megatron.losses.objective import Slope
from mft_megatron.mcore.kernels.mixed_products import add_product, multiply

from .logit_blocks import block_rule


@dataclasses.dataclass(frozen=True)
class VocabularyShard:
    """The rows of the output weight, without padding, that a tensor-parallel rank has.

    Attributes:
        first: id of the first row.
        rows: number of rows; 0 where the rank has only padding.
        group: the ranks over which the vocabulary is split; ``None`` where it is not.
    """

    first: int
    rows: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None) -> "VocabularyShard":
        """Describe this rank's shard of a weight whose rows are split evenly over the ranks, padding last.

        Args:
            weight: [rows of this rank, H].
            vocab_size: number of real ids.
            group: the ranks.
        """
        first = 0 if group is None else dist.get_rank(group) * weight.shape[0]
        return cls(first, min(max(vocab_size - first, 0), weight.shape[0]), group)


def token_losses(
    hidden_NH: Tensor,
    weight: Tensor,
    labels_N: Tensor,
    shard: VocabularyShard,
    slope: Slope | None = None,
    block_tokens: int | None = None,
) -> Tensor:
    """Compute ``-log p(label)`` of every token, with a softmax over the real vocabulary.

    With ``slope`` and gradients turned on, the forward pass computes the weight's gradient; ``backward`` must then be
    called with exactly this slope, which is checked. Where the weight has a ``main_grad`` in fp32 (that of Megatron's
    data parallelism), its gradient is added there, and no tensor of its size is allocated; hooks on its gradient fire
    as usual.

    Args:
        hidden_NH: the same on all ranks of ``shard.group``; their gradients are to be summed over the ranks.
        weight: [rows of this rank, H], dtype of the hidden states; may be frozen.
        labels_N: int64, real ids.
        shard: the ids of the rows of ``weight``.
        slope: the gradient [N] of the losses that ``backward`` will get, where it is known in advance. Not used where
            the weight is frozen: then ``backward`` may get any gradient.
        block_tokens: tokens of a block; ``None`` for a number that suits the device.

    Returns:
        fp32 [N] (fp64 of fp64 inputs), the same on all ranks; differentiable.
    """
    rule, with_weight = block_rule(weight), torch.is_grad_enabled() and weight.requires_grad
    tokens = block_tokens or rule.tokens(len(hidden_NH), weight, with_weight)
    if not torch.is_grad_enabled():
        return _Blocks(weight, labels_N, shard, tokens).losses(hidden_NH)[0]
    return _TokenLosses.apply(hidden_NH, weight, labels_N, shard, slope, tokens)


class _Blocks:
    """The computation, block by block, without autograd.

    Attributes:
        tokens: tokens of a block.
        weight: the real rows [V, H] of this rank, and on a GPU some of the padding after them (:mod:`.logit_blocks`).
        has_label_N: bool, whether the label is one of these rows.
        column_N: int64, the label's row; 0 where another rank has it.
        dtype: of the losses, at least fp32.
    """

    def __init__(self, weight: Tensor, labels_N: Tensor, shard: VocabularyShard, tokens: int):
        self.shard, self.tokens = shard, tokens
        self.rule = block_rule(weight)
        self.weight = weight.detach()[: self.rule.columns_of(shard.rows, weight)]
        self.has_label_N = (labels_N >= shard.first) & (labels_N < shard.first + shard.rows)
        self.column_N = torch.where(self.has_label_N, labels_N - shard.first, 0)
        self.dtype = torch.promote_types(weight.dtype, torch.float32)

    def slices(self, length: int) -> list[slice]:
        """The blocks of ``length`` tokens."""
        return [slice(start, min(start + self.tokens, length)) for start in range(0, length, self.tokens)]

    def losses(
        self, hidden_NH: Tensor, gradients: "_Gradients | None" = None, slope: Slope | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, maxima of the logits and Σ exp(logit - maximum), [N] each, at least fp32.

        With ``gradients`` those are computed too, at ``slope``, or at a slope of 1 where that is ``None``.
        """
        loss_N, maximum_N, total_N = hidden_NH.new_empty(3, hidden_NH.shape[0], dtype=self.dtype)
        buffer = _Buffer(self, hidden_NH, with_gradients=gradients is not None)
        for block in self.slices(hidden_NH.shape[0]):
            logits = buffer.logits(hidden_NH[block])
            maximum_C, label_C = self._maximum(logits), self._label(logits, block)
            logits.sub_(maximum_C[:, None]).exp_()
            maximum_N[block], total_N[block], label_C = self._over_ranks(maximum_C, logits.sum(-1), label_C)
            loss_N[block] = total_N[block].log() - (label_C - maximum_N[block])
            if gradients is not None:
                slope_C = torch.ones_like(label_C) if slope is None else slope.take(block).at(loss_N[block])
                logits.mul_(((maximum_C - maximum_N[block]).exp() * (slope_C / total_N[block]))[:, None])
                self._add(gradients, buffer, slope_C, hidden_NH, block)
        return loss_N, maximum_N, total_N

    def add_gradients(
        self, hidden_NH: Tensor, maximum_N: Tensor, total_N: Tensor, slope_N: Tensor, gradients: "_Gradients"
    ) -> None:
        """Compute the logits again, and gradients from them; needs no communication between ranks.

        Args:
            hidden_NH: as in the forward pass.
            maximum_N: maxima of the logits over the vocabulary, at least fp32.
            total_N: Σ exp(logit - maximum) over the vocabulary, at least fp32.
            slope_N: gradient of the losses.
            gradients: to which they are added.
        """
        buffer = _Buffer(self, hidden_NH, with_gradients=True)
        for block in self.slices(hidden_NH.shape[0]):
            logits = buffer.logits(hidden_NH[block]).sub_(maximum_N[block, None]).exp_()
            logits.mul_((slope_N[block] / total_N[block])[:, None])
            self._add(gradients, buffer, slope_N[block], hidden_NH, block)

    def _maximum(self, logits: Tensor) -> Tensor:
        """Maximum of [C, V] logits over this rank's rows, [C]."""
        if not self.shard.rows:
            return logits.new_full(logits.shape[:1], float("-inf"))
        return logits.amax(-1)

    def _label(self, logits: Tensor, block: slice) -> Tensor:
        """Logit of the label, [C]; 0 where another rank has it."""
        if not self.shard.rows:
            return logits.new_zeros(logits.shape[0])
        return torch.where(self.has_label_N[block], logits.gather(1, self.column_N[block, None])[:, 0], 0.0)

    def _over_ranks(self, maximum_C: Tensor, total_C: Tensor, label_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Combine maximum, Σ exp(logit - maximum) and label's logit over the vocabulary, with one all-gather."""
        group = self.shard.group
        if group is None or dist.get_world_size(group) == 1:
            return maximum_C, total_C, label_C
        of_rank = torch.stack([maximum_C, total_C, label_C])
        of_ranks = of_rank.new_empty(dist.get_world_size(group), *of_rank.shape)
        dist.all_gather(list(of_ranks), of_rank, group=group)
        maxima, totals, labels = of_ranks.unbind(1)
        maximum = maxima.amax(0)
        return maximum, (totals * (maxima - maximum).exp()).sum(0), labels.sum(0)

    def _add(
        self, gradients: "_Gradients", buffer: "_Buffer", slope_C: Tensor, hidden_NH: Tensor, block: slice
    ) -> None:
        """Add a block's gradients; the buffer holds slope · softmax, the logits' gradient but for the labels."""
        if self.shard.rows:
            at_label_C = torch.where(self.has_label_N[block], -slope_C, 0.0)
            buffer.exact[: len(slope_C)].scatter_add_(1, self.column_N[block, None], at_label_C[:, None])
            gradients.add(buffer.rounded(len(slope_C)), self.weight, hidden_NH[block], block)


class _Buffer:
    """Memory for the logits of one block after another, and for the gradients that replace them.

    Allocating it for each block would take some percent of the time. Columns after the real rows' are for padding.

    Attributes:
        weight: [columns, H], of the output weight.
        rows: number of real rows V, the first columns.
        exact: [C, columns] in at least fp32.
        raw: [C, columns] in the dtype of the hidden states; the same tensor as ``exact`` where that has this dtype,
            ``None`` where there are no gradients.
    """

    def __init__(self, blocks: _Blocks, hidden_NH: Tensor, with_gradients: bool):
        self.weight, self.rows = blocks.weight, blocks.shard.rows
        shape = min(blocks.tokens, hidden_NH.shape[0]), len(self.weight), hidden_NH
        self.exact = blocks.rule.allocate(*shape, blocks.dtype)
        self.raw: Tensor | None = self.exact
        if hidden_NH.dtype != blocks.dtype:
            self.raw = blocks.rule.allocate(*shape, hidden_NH.dtype) if with_gradients else None

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """Compute a block's logits into ``exact``; returns those of real rows, [C, V]."""
        multiply(hidden_CH, self.weight.t(), self.exact[: len(hidden_CH)])
        return self.exact[: len(hidden_CH), : self.rows]

    def rounded(self, tokens: int) -> Tensor:
        """Round the content of ``exact`` to the dtype of the hidden states: [tokens, columns], 0 for padding."""
        assert self.raw is not None
        if self.raw is not self.exact:
            # To convert whole tensors is faster than operators on two dtypes, which convert as well.
            self.raw[:tokens, : self.rows] = self.exact[:tokens, : self.rows]
        if self.rows < len(self.weight):
            self.raw[:tokens, self.rows :] = 0
        return self.raw[:tokens]


class _Gradients:
    """Gradients of hidden states and weight, accumulated block by block.

    Attributes:
        hidden_NH: in the dtype of the hidden states, as between all layers.
        weight_VH: fp32 (fp64 of fp64), the weight's ``main_grad`` or a tensor of its size; ``None`` where it is frozen.
        in_main_grad: whether ``weight_VH`` is the ``main_grad``.
    """

    def __init__(self, hidden_NH: Tensor, weight: Tensor, with_weight: bool):
        self.hidden_NH = torch.zeros_like(hidden_NH)
        self.weight_VH: Tensor | None = None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        main_grad = getattr(weight, "main_grad", None)
        self.in_main_grad = with_weight and main_grad is not None and main_grad.dtype == dtype
        if with_weight:
            self.weight_VH = main_grad if self.in_main_grad else torch.zeros_like(weight, dtype=dtype)

    def add(self, logits_gradient: Tensor, weight: Tensor, hidden_CH: Tensor, block: slice) -> None:
        """Add the gradients of a block of tokens.

        Args:
            logits_gradient: [C, columns], dtype of the hidden states.
            weight: [columns, H].
            hidden_CH: the block's hidden states.
            block: its tokens.
        """
        torch.mm(logits_gradient, weight, out=self.hidden_NH[block])
        if self.weight_VH is not None:
            add_product(self.weight_VH[: len(weight)], logits_gradient.t(), hidden_CH)

    def for_autograd(self, weight: Tensor) -> Tensor | None:
        """The gradient of the weight [rows of this rank, H] that ``backward`` has to return.

        ``None`` where the weight is frozen, or its gradient is in ``main_grad``.
        """
        if self.weight_VH is None or not self.in_main_grad:
            return None if self.weight_VH is None else self.weight_VH.to(weight.dtype)
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's mark
        if not getattr(weight, "zero_out_wgrad", False):
            # Megatron's hook needs some gradient, and drops it. This one takes no memory; autograd would copy it if it
            # were returned. A weight that is tied within a stage gets a gradient from the embedding.
            weight.grad = weight.new_zeros(()).expand_as(weight)
        return None


class _TokenLosses(torch.autograd.Function):
    """Token losses and their gradients, which the forward pass computes where it can.

    ``ctx.frozen``: the weight has no gradient, and that of the hidden states is linear in the slope, so it is computed
    for a slope of 1. ``ctx.formed``: the forward pass has computed the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight: Tensor,
        labels_N: Tensor,
        shard: VocabularyShard,
        slope: Slope | None,
        tokens: int,
    ) -> Tensor:
        blocks, ctx.weight = _Blocks(weight, labels_N, shard, tokens), weight
        ctx.frozen = not ctx.needs_input_grad[1]
        ctx.formed = ctx.frozen or slope is not None
        if not ctx.formed:
            loss_N, *totals = blocks.losses(hidden_NH)
            ctx.blocks = blocks
            ctx.save_for_backward(hidden_NH, *totals)
            return loss_N
        ctx.gradients = _Gradients(hidden_NH, weight, with_weight=not ctx.frozen)
        loss_N, *_ = blocks.losses(hidden_NH, ctx.gradients, None if ctx.frozen else slope)
        ctx.expected_N = None if ctx.frozen or slope is None else slope.at(loss_N)
        return loss_N

    @staticmethod
    def backward(ctx: Any, slope_N: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.formed:
            gradients, ctx.gradients = ctx.gradients, None  # autograd must hold the only reference
        else:
            hidden_NH, maximum_N, total_N = ctx.saved_tensors
            gradients = _Gradients(hidden_NH, ctx.weight, with_weight=True)
            ctx.blocks.add_gradients(hidden_NH, maximum_N, total_N, slope_N, gradients)
        if ctx.frozen:
            gradients.hidden_NH.mul_(slope_N[:, None])
        elif ctx.formed:
            _check(slope_N, ctx.expected_N)
        return gradients.hidden_NH, gradients.for_autograd(ctx.weight), None, None, None, None


def _check(slope_N: Tensor, expected_N: Tensor) -> None:
    """Refuse another slope [N] than the forward pass assumed, without waiting for the device.

    Backward must receive the gradient that forward assumed; non-finite values are ignored.
    """
    wrong_N = (slope_N - expected_N).abs() > 1e-5 * expected_N.abs()
    torch._assert_async(~wrong_N.any(), "token losses: backward got another slope than forward assumed")

"""Output layer and cross entropy in one: token losses, and never more than a chunk of tokens' logits.

::

    hidden [N, H] ─► a chunk [C, H] ─► logits [C, V] ─► maximum, Σ exp, label's logit ─► over ranks ─► losses [C]
                                             └─► slope · (softmax - one-hot) ─► gradient of hidden [C, H]
                                                                             └─► added to the weight's gradient [V, H]

``N`` supervised tokens, ``C`` tokens of a chunk, ``V`` rows of the output weight on this tensor-parallel rank, ``H``
hidden size. Where ``dL/dl_t``, the *slope*, is known beforehand, the lower line runs in the forward pass, while the
logits are there; otherwise the backward pass makes them again, chunk by chunk. Torch and a process group, nothing else.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from mft_megatron.losses.objective import Slope

# Logits of a chunk on one rank: 64 MiB in fp32 on a CPU, which multiplies no faster with more, but slower with fewer
# than 256 tokens. A GPU reads and writes the whole of the weight's gradient for each chunk, so that takes 512 MiB.
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
MIN_CHUNK_TOKENS = 256
# rows of the weight whose gradient is made at a time where it must be converted before it is added: what a cache holds
CONVERTED_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class VocabularyPart:
    """The rows of the output weight that a tensor-parallel rank has: real ids from ``first`` on, ``rows`` many.

    ``rows`` may be 0, where a rank has nothing but padding. ``group``: of the ranks that share the vocabulary; ``None``
    for one that has it all.
    """

    first: int
    rows: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None) -> "VocabularyPart":
        """Of this rank's part of a weight whose rows are dealt out evenly, padding last."""
        first = 0 if group is None else dist.get_rank(group) * weight.shape[0]
        return cls(first, min(max(vocab_size - first, 0), weight.shape[0]), group)


def token_losses(
    hidden_NH: Tensor,
    weight: Tensor,
    labels_N: Tensor,
    part: VocabularyPart,
    slope: Slope | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """``-log p(label)`` of every token, with a softmax over the real vocabulary.

    With ``slope`` and gradients turned on, the weight's gradient is formed at once; ``backward`` must then be called
    with just this slope, which it checks. A weight with a ``main_grad`` in fp32 (that of Megatron's data parallelism)
    has its gradient added there, and no tensor of its size is made; the hooks on its gradient fire as ever.

    Args:
        hidden_NH: the same on all ranks of ``part.group``; their gradients are to be summed over them.
        weight: [rows of this rank, H], dtype of the hidden states; may be frozen.
        labels_N: int64, real ids.
        part: which rows these are.
        slope: the gradient of the losses that ``backward`` will bring, where it is known beforehand; [N]. Of no use
            where the weight is frozen: then any gradient does.
        chunk_tokens: tokens that are computed at a time.

    Returns:
        fp32 [N] (fp64 of fp64), the same on all ranks; differentiable.
    """
    chunk = chunk_tokens or max(CHUNK_LOGITS[weight.device.type] // weight.shape[0], MIN_CHUNK_TOKENS)
    if not torch.is_grad_enabled():
        return _Chunks(weight, labels_N, part, chunk).losses(hidden_NH)[0]
    return _TokenLosses.apply(hidden_NH, weight, labels_N, part, slope, chunk)


class _Chunks:
    """The computation, chunk by chunk, without autograd."""

    def __init__(self, weight: Tensor, labels_N: Tensor, part: VocabularyPart, tokens: int):
        self.part, self.tokens = part, tokens
        self.weight = weight.detach()[: part.rows]
        self.own_N = (labels_N >= part.first) & (labels_N < part.first + part.rows)
        self.column_N = torch.where(self.own_N, labels_N - part.first, 0)
        self.dtype = torch.promote_types(weight.dtype, torch.float32)

    def slices(self, length: int) -> list[slice]:
        return [slice(start, min(start + self.tokens, length)) for start in range(0, length, self.tokens)]

    def losses(
        self, hidden_NH: Tensor, gradients: "_Gradients | None" = None, slope: Slope | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, maxima of the logits and Σ exp(logit - maximum), [N] each.

        With ``gradients`` also those, at ``slope``, or at 1 everywhere without a slope.
        """
        loss_N, maximum_N, total_N = hidden_NH.new_empty(3, hidden_NH.shape[0], dtype=self.dtype)
        room = _Room(self, hidden_NH)
        for own in self.slices(hidden_NH.shape[0]):
            share = room.logits(hidden_NH[own])
            maximum_C, label_C = self._maximum(share), self._label(share, own)
            share.sub_(maximum_C[:, None]).exp_()
            maximum_N[own], total_N[own], label_C = self._over_ranks(maximum_C, share.sum(-1), label_C)
            loss_N[own] = total_N[own].log() - (label_C - maximum_N[own])
            if gradients is not None:
                slope_C = torch.ones_like(label_C) if slope is None else slope.take(own).at(loss_N[own])
                share.mul_(((maximum_C - maximum_N[own]).exp() * (slope_C / total_N[own]))[:, None])
                self._add(gradients, room, slope_C, hidden_NH, own)
        return loss_N, maximum_N, total_N

    def again(self, hidden_NH: Tensor, maximum_N: Tensor, total_N: Tensor, slope_N: Tensor, to: "_Gradients") -> None:
        """Gradients alone; what the ranks had to tell each other is known."""
        room = _Room(self, hidden_NH)
        for own in self.slices(hidden_NH.shape[0]):
            share = room.logits(hidden_NH[own]).sub_(maximum_N[own, None]).exp_()
            share.mul_((slope_N[own] / total_N[own])[:, None])
            self._add(to, room, slope_N[own], hidden_NH, own)

    def _maximum(self, logits: Tensor) -> Tensor:
        if not self.part.rows:
            return logits.new_full(logits.shape[:1], float("-inf"))
        return logits.amax(-1)

    def _label(self, logits: Tensor, own: slice) -> Tensor:
        """Logit of the label, 0 where another rank has it."""
        if not self.part.rows:
            return logits.new_zeros(logits.shape[0])
        return torch.where(self.own_N[own], logits.gather(1, self.column_N[own, None])[:, 0], 0.0)

    def _over_ranks(self, maximum_C: Tensor, total_C: Tensor, label_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maximum, Σ exp(logit - maximum) and label's logit over the whole vocabulary: one message a chunk."""
        group = self.part.group
        if group is None or dist.get_world_size(group) == 1:
            return maximum_C, total_C, label_C
        mine = torch.stack([maximum_C, total_C, label_C])
        all_ranks = mine.new_empty(dist.get_world_size(group), *mine.shape)
        dist.all_gather(list(all_ranks), mine, group=group)
        maxima, totals, labels = all_ranks.unbind(1)
        maximum = maxima.amax(0)
        return maximum, (totals * (maxima - maximum).exp()).sum(0), labels.sum(0)

    def _add(self, gradients: "_Gradients", room: "_Room", slope_C: Tensor, hidden_NH: Tensor, own: slice) -> None:
        """With slope · softmax where the logits were: the gradient of the logits but for the labels."""
        if self.part.rows:
            at_label_C = torch.where(self.own_N[own], -slope_C, 0.0)
            room.exact[: len(slope_C)].scatter_add_(1, self.column_N[own, None], at_label_C[:, None])
            gradients.add(room.rounded(len(slope_C)), self.weight, hidden_NH[own], own)


class _Room:
    """Where a chunk's logits and what becomes of them lie, one chunk after another.

    ``exact`` in at least fp32; ``raw`` in the dtype of the hidden states, the same memory where that is the same dtype.
    Made anew for each chunk, memory would come from the system each time, and cost some percent of it all.
    """

    def __init__(self, chunks: _Chunks, hidden_NH: Tensor):
        self.weight = chunks.weight
        self.raw = hidden_NH.new_empty(min(chunks.tokens, hidden_NH.shape[0]), chunks.part.rows)
        self.exact = self.raw.to(chunks.dtype)

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """Of a chunk, exact."""
        torch.mm(hidden_CH, self.weight.t(), out=self.raw[: len(hidden_CH)])
        if self.exact is not self.raw:
            # whole tensors are converted: torch's operators of two dtypes convert them, too, and slower
            self.exact[: len(hidden_CH)] = self.raw[: len(hidden_CH)]
        return self.exact[: len(hidden_CH)]

    def rounded(self, tokens: int) -> Tensor:
        """What has become of them, in the dtype of the hidden states."""
        if self.exact is not self.raw:
            self.raw[:tokens] = self.exact[:tokens]
        return self.raw[:tokens]


class _Gradients:
    """Gradients of hidden states and weight, as they come.

    ``hidden_NH`` in the dtype of the hidden states, as between all layers. ``weight_VH`` is fp32 (fp64 of fp64): the
    weight's ``main_grad`` or a tensor like it; ``None`` for a frozen weight.
    """

    def __init__(self, hidden_NH: Tensor, weight: Tensor, with_weight: bool):
        self.hidden_NH = torch.zeros_like(hidden_NH)
        self.weight_VH = None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        main = getattr(weight, "main_grad", None)
        self.in_main_grad = with_weight and main is not None and main.dtype == dtype
        if with_weight:
            self.weight_VH = main if self.in_main_grad else torch.zeros_like(weight, dtype=dtype)

    def add(self, logits_gradient: Tensor, weight: Tensor, hidden_CH: Tensor, own: slice) -> None:
        torch.mm(logits_gradient, weight, out=self.hidden_NH[own])
        if self.weight_VH is None:
            return
        if self.weight_VH.dtype == hidden_CH.dtype:
            self.weight_VH[: len(weight)].addmm_(logits_gradient.t(), hidden_CH)
            return
        for first in range(0, len(weight), CONVERTED_ROWS):
            rows = slice(first, min(first + CONVERTED_ROWS, len(weight)))
            self.weight_VH[rows] += logits_gradient[:, rows].t() @ hidden_CH

    def for_autograd(self, weight: Tensor) -> Tensor | None:
        """What ``backward`` returns for the weight."""
        if self.weight_VH is None or not self.in_main_grad:
            return None if self.weight_VH is None else self.weight_VH.to(weight.dtype)
        weight.grad_added_to_main_grad = True
        if not getattr(weight, "zero_out_wgrad", False):
            # Megatron's hook wants to see some gradient, and drops it. This one takes no memory; autograd would copy it
            # if it were returned. A weight that is tied within a stage gets one from the embedding.
            weight.grad = weight.new_zeros(()).expand_as(weight)
        return None


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight, labels_N, part, slope, chunk):
        chunks, ctx.weight = _Chunks(weight, labels_N, part, chunk), weight
        ctx.frozen = not ctx.needs_input_grad[1]
        ctx.formed = ctx.frozen or slope is not None
        if not ctx.formed:
            loss_N, *totals = chunks.losses(hidden_NH)
            ctx.chunks = chunks
            ctx.save_for_backward(hidden_NH, *totals)
            return loss_N
        ctx.gradients = _Gradients(hidden_NH, weight, with_weight=not ctx.frozen)
        loss_N, *_ = chunks.losses(hidden_NH, ctx.gradients, None if ctx.frozen else slope)
        ctx.expected_N = None if ctx.frozen else slope.at(loss_N)
        return loss_N

    @staticmethod
    def backward(ctx, slope_N):
        if ctx.formed:
            gradients, ctx.gradients = ctx.gradients, None  # so that nothing but autograd holds them any more
        else:
            hidden_NH, *totals = ctx.saved_tensors
            gradients = _Gradients(hidden_NH, ctx.weight, with_weight=True)
            ctx.chunks.again(hidden_NH, *totals, slope_N, gradients)
        if ctx.frozen:
            gradients.hidden_NH.mul_(slope_N[:, None])
        elif ctx.formed:
            _check(slope_N, ctx.expected_N)
        return gradients.hidden_NH, gradients.for_autograd(ctx.weight), *(None,) * 4


def _check(slope_N: Tensor, expected_N: Tensor) -> None:
    """The gradients were formed for a slope; another one that comes must not pass. What is not finite is not its
    business. Does not wait for the device."""
    wrong_N = (slope_N - expected_N).abs() > 1e-5 * expected_N.abs()
    torch._assert_async(~wrong_N.any(), "token losses: backward brings another slope than forward was told")

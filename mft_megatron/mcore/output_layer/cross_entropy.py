"""Negative log-likelihood per token over a vocabulary that is split over tensor-parallel ranks.

By ``--cross-entropy-impl``: :func:`vocab_parallel_nll` of the logits of all tokens, or :class:`FusedOutputLayer`, which
never has them.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses

from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from mft_megatron.losses.objective import Slope

from .fused_cross_entropy import VocabularyPart, token_losses


def vocab_parallel_nll(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """``-log p(label)`` for every token, with a softmax over the real vocabulary.

    Rows that only pad the vocabulary would take part of the probability: padding 131 to 256 rows raises a fresh
    model's loss by 0.58. They are masked on the rank that has them.

    Args:
        logits: [..., padded vocabulary / TP], any floating dtype; fp32 logits may be overwritten.
        labels: int64 [...], ids below ``vocab_size``.
        vocab_size: real size of the vocabulary.

    Returns:
        fp32 [...], the same on all tensor-parallel ranks; differentiable in the logits.
    """
    columns = logits.shape[-1]
    real_columns = vocab_size - parallel_state.get_tensor_model_parallel_rank() * columns
    logits = logits.float()
    if real_columns < columns:
        padding = logits.new_zeros(columns, dtype=bool)
        padding[max(real_columns, 0) :] = True
        logits = logits.masked_fill(padding, float("-inf"))
    return vocab_parallel_cross_entropy(logits, labels)


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the losses of a micro-batch are made of, as one stream of T tokens.

    ``labels_T`` int64. ``supervised_N`` int64: where in the stream the loss mask is 1. ``slope``: gradient of the
    losses [N], where it is known beforehand and a backward pass follows.
    """

    labels_T: Tensor
    supervised_N: Tensor
    slope: Slope | None
    vocab_size: int


class FusedOutputLayer(ColumnParallelLinear):
    """Megatron's output layer; with ``targets`` it makes token losses of hidden states.

    Called as a module, since Megatron's data parallelism waits for the weight in a hook on that. Only supervised tokens
    are computed.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        targets: Targets | None = None,
    ):
        """
        Args:
            input_: hidden states [T, 1, H], or [T / TP, 1, H] with sequence parallelism.
            weight: the embedding's, where it is shared.
            runtime_gather_output: Megatron's.
            targets: of the micro-batch.

        Returns:
            fp32 [1, T], 0 for tokens that are not supervised; without targets what Megatron returns.
        """
        if targets is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            # its backward sums the gradients over the ranks and gives each its own tokens
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        hidden_NH = input_.squeeze(1).index_select(0, targets.supervised_N)
        if not self.sequence_parallel:
            hidden_NH = copy_to_tensor_model_parallel_region(hidden_NH, group=self.tp_group)
        labels_N = targets.labels_T.index_select(0, targets.supervised_N)
        part = VocabularyPart.of(weight, targets.vocab_size, self.tp_group)
        loss_N = token_losses(hidden_NH, weight, labels_N, part, targets.slope)
        return loss_N.new_zeros(targets.labels_T.shape).index_copy(0, targets.supervised_N, loss_N)[None]

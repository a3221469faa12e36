"""Negative log-likelihood per token over a vocabulary that is split over tensor-parallel ranks.

``--cross-entropy-impl megatron``: :func:`vocab_parallel_nll` of the logits of all tokens. ``fused-linear``:
:class:`FusedOutputLayer`, which never holds those.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from mft_megatron.losses.objective import Slope

from .fused_cross_entropy import VocabularyShard, token_losses


def vocab_parallel_nll(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Compute ``-log p(label)`` for every token, with a softmax over the real vocabulary.

    Rows that only pad the vocabulary would get a part of the probability: padding 131 to 256 rows raises the loss of a
    newly initialised model by 0.58. They are masked on the rank that has them.

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
        padding = logits.new_zeros(columns, dtype=torch.bool)
        padding[max(real_columns, 0) :] = True
        logits = logits.masked_fill(padding, float("-inf"))
    return vocab_parallel_cross_entropy(logits, labels)


@dataclasses.dataclass(frozen=True)
class Targets:
    """Labels and supervised tokens of a micro-batch, as one stream of T tokens.

    Attributes:
        labels_T: int32 or int64.
        supervised_N: int64, indices in the stream of tokens whose loss mask is 1.
        slope: gradient [N] of their losses, where it is known in advance and a backward pass follows.
        vocab_size: number of real ids.
    """

    labels_T: Tensor
    supervised_N: Tensor
    slope: Slope | None
    vocab_size: int


class FusedOutputLayer(ColumnParallelLinear):
    """Megatron's output layer; with ``targets`` it computes token losses from hidden states.

    Call it as a module: Megatron's data parallelism waits for the weight in a forward hook. Only supervised tokens are
    computed.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        targets: Targets | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Compute token losses, or without targets logits.

        Args:
            input_: hidden states [T, 1, H], or [T / TP, 1, H] with sequence parallelism.
            weight: the embedding's, where it is tied.
            runtime_gather_output: whether Megatron gathers the logits; only without targets.
            targets: of the micro-batch.

        Returns:
            losses fp32 [1, T], 0 for unsupervised tokens; without targets logits and bias, as Megatron returns them.
        """
        if targets is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            # Its backward pass sums the gradients over the ranks and gives each those of its tokens.
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        hidden_NH = input_.squeeze(1).index_select(0, targets.supervised_N)
        if not self.sequence_parallel:
            hidden_NH = copy_to_tensor_model_parallel_region(hidden_NH, group=self.tp_group)
        labels_N = targets.labels_T.index_select(0, targets.supervised_N).long()
        shard = VocabularyShard.of(weight, targets.vocab_size, self.tp_group)
        loss_N = token_losses(hidden_NH, weight, labels_N, shard, targets.slope)
        return loss_N.new_zeros(targets.labels_T.shape).index_copy(0, targets.supervised_N, loss_N)[None]

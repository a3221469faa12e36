"""The few values that cross rooms: which rank am I, what does this step consume, one micro-batch.

Shape legend, used in every name of the project:

====  =====================================================================
``B``  rows (packs) of a micro-batch
``S``  token positions of a row: ``--seq-length``, or less where rows are padded
``K``  tasks of the data set
``G``  packs of a global batch: ``--global-batch-size``
``N``  supervised tokens of a micro-batch
====  =====================================================================

Arrays are numpy when ``data`` makes them and torch tensors after ``mcore`` has put them on its device.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the data-parallel group; a test can build one by hand."""

    data_rank: int = 0
    data_size: int = 1


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step (or one evaluation step) consumes, the same on every rank.

    ``packs_G`` int64 [G]: pack numbers; -1 is an empty row, which only fills up the last step of an evaluation.
    ``supervised_tokens_K`` int64 [K]: ``T_i`` of LOSSES.md, targets that count, per task over the whole global batch.
    ``samples_K`` int64 [K]: ``M_i`` of LOSSES.md, samples with at least one such target.
    ``epochs_G`` int64 [G]: the epoch each pack is used for. ``costs_G`` int64 [G]: what a row costs to compute, in
    units that compare within the plan; 0 for an empty row.
    """

    packs_G: np.ndarray
    supervised_tokens_K: np.ndarray
    samples_K: np.ndarray
    epochs_G: np.ndarray
    costs_G: np.ndarray


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packs.

    The rows lie one behind the other in a stream of B·S tokens. The stream is cut into *segments*: each piece of a
    sample is one (in a joined data set all pieces of a row are one), and the padding at the end of a row is one.
    Attention, positions and losses never cross a segment's border.

    ``tokens_BS`` int64; padding holds the pad id, which nothing ever compares with.
    ``labels_BS`` int64: the next token of the same sample; 0 where there is none.
    ``loss_mask_BS`` uint8: 1 where the label is supervised; 0 at a sample's last position and in padding.
    ``position_ids_BS`` int64: restart at 0 with each segment.
    ``sample_ids_BS`` int64: number of the segment, 0 … segments-1 over the whole stream.
    ``task_ids_BS`` int64: task of the sample; 0 in padding, where the mask is 0.
    ``cu_seqlens`` int32 [segments+1]: where each segment starts in the stream, then B·S.
    ``max_seqlen`` int: length of the longest segment.
    ``lengths_B`` int64: tokens of each row before its padding; ``None`` where no row has any.
    ``shard``: the part of it that this rank computes, a ``ContextParallelShard``; only of tensors. Its tokens are
    counted on the host, before the rest goes to the device, so that nothing has to wait for a number of tokens.
    """

    tokens_BS: Any
    labels_BS: Any
    loss_mask_BS: Any
    position_ids_BS: Any
    sample_ids_BS: Any
    task_ids_BS: Any
    cu_seqlens: Any
    max_seqlen: int
    shard: Any = None
    lengths_B: Any = None

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.shape[0] - 1

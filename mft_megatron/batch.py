"""The few values that cross rooms: the rank of this process, the plan of a step, one micro-batch.

Shape legend, used in every name of the project:

====  =====================================================================
``B``  rows (packs) of a micro-batch
``S``  token positions of a row: ``--seq-length``, or less where rows are padded
``T``  tokens of a stream: the B·S tokens of a micro-batch, or the part of them that a rank computes
``K``  tasks of the data set
``G``  packs of a global batch: ``--global-batch-size``
``N``  supervised tokens of a micro-batch
====  =====================================================================

Arrays are numpy when ``data`` makes them and torch tensors after ``mcore`` has copied them to its device.
"""

from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np


class Shaped(Protocol):
    """An array of some library: numpy's or torch's, which floor 0 does not import."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        ...


Array = TypeVar("Array", bound=Shaped)


@dataclass(frozen=True)
class Ranks:
    """Position of this process in the data-parallel group; a test can build one by hand.

    Attributes:
        data_rank: rank in the group, 0 to ``data_size - 1``.
        data_size: number of ranks in the group.
    """

    data_rank: int = 0
    data_size: int = 1


class TaskCounts(NamedTuple):
    """Numbers of each task in some packs: counts, and the same as sums of weights (docs/LOSSES.md §1).

    Attributes:
        tokens_K: int64 [K], supervised targets.
        samples_K: int64 [K], samples that have any.
        token_weights_K: fp64 [K], ``T_i``: sum over the targets of the weight of their sample times that of their turn.
        sample_weights_K: fp64 [K], ``M_i``: sum of the weights of these samples.
    """

    tokens_K: np.ndarray
    samples_K: np.ndarray
    token_weights_K: np.ndarray
    sample_weights_K: np.ndarray


@dataclass(frozen=True)
class StepPlan:
    """Packs that one optimizer step (or one evaluation step) consumes, the same on every rank.

    Attributes:
        packs_G: int64 [G], indices of packs; -1 is an empty row, which only fills up the last step of an evaluation, or
            of a run that ends with an epoch.
        counts: of the global batch.
        epochs_G: int64 [G], the epoch each pack is used for.
        costs_G: int64 [G], computational cost of each row, in units that compare within the plan; 0 for an empty row.
    """

    packs_G: np.ndarray
    counts: TaskCounts
    epochs_G: np.ndarray
    costs_G: np.ndarray

    @property
    def num_packs(self) -> int:
        """Number of packs without the empty rows."""
        return int(np.count_nonzero(self.packs_G >= 0))


@dataclass(frozen=True)
class Batch(Generic[Array]):
    """One micro-batch of packs: ``Batch[np.ndarray]`` on the host, ``Batch[Tensor]`` on a device.

    The rows, concatenated, are a stream of B·S tokens. The stream consists of *segments*: each sample slice is one (in
    a joined data set all slices of a row are one), and the padding at the end of a row is one. Attention, positions and
    losses never cross the border of a segment.

    Attributes:
        tokens_BS: int64; padding holds the pad id, which is never compared with anything.
        labels_BS: int64, the next token of the same sample; 0 where there is none.
        loss_mask_BS: uint8, 1 where the label is supervised; 0 at a sample's last position and in padding.
        position_ids_BS: int64, restart at 0 with each segment.
        sample_ids_BS: int64, index of the segment, 0 … segments-1 over the whole stream.
        task_ids_BS: int64, task of the sample; 0 in padding, where the mask is 0.
        cu_seqlens: int32 [segments+1], index in the stream of the first token of each segment, then B·S.
        max_seqlen: length of the longest segment.
        lengths_B: int64, tokens of each row before its padding; ``None`` where no row has any.
        token_weights_BS: float32, weight of the label's turn, 0 where the mask is 0; ``None`` where all are 1.
        sample_weights_BS: float32, weight of the label's sample; 0 in padding; ``None`` where all are 1.
    """

    tokens_BS: Array
    labels_BS: Array
    loss_mask_BS: Array
    position_ids_BS: Array
    sample_ids_BS: Array
    task_ids_BS: Array
    cu_seqlens: Array
    max_seqlen: int
    lengths_B: Array | None = None
    token_weights_BS: Array | None = None
    sample_weights_BS: Array | None = None

    @property
    def num_segments(self) -> int:
        """Number of segments in the stream, known on the host."""
        return self.cu_seqlens.shape[0] - 1

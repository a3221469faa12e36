"""Mean token losses of single sample slices, to find those that make a step's loss large or not finite."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mft_megatron.data.loading.dataset import Rows
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.parallel.device_batch import DeviceBatch


@dataclasses.dataclass(frozen=True)
class SliceLoss:
    """The loss of one sample slice.

    Attributes:
        sample: index of the sample.
        first_token: of the slice, within the sample.
        tokens: supervised tokens.
        loss: mean over them, without weights; may be NaN or infinite.
    """

    sample: int
    first_token: int
    tokens: int
    loss: float


class SliceLosses:
    """Collects the losses of the sample slices of some micro-batches, on the ranks that report losses.

    The host waits for each micro-batch: this is for a batch that is looked into, not for training.
    """

    def __init__(self, rows: Sequence[Rows]):
        """``rows``: the sample slices of each row of each micro-batch, in the order in which they are computed."""
        self._rows = iter(rows)
        self.found: list[SliceLoss] = []

    def of_batch(self, batch: DeviceBatch) -> "_OneBatch":
        """The functions of the pipeline's output for one micro-batch."""
        return _OneBatch(self._add, batch)

    def _add(self, batch: DeviceBatch, loss_T: Tensor) -> None:
        loss_BS = batch.shard.sum(loss_T.detach().view(batch.labels_BS.shape))
        if not process_groups.reports_losses():
            return
        rows = next(self._rows)
        # context-parallel ranks have the same sums
        if process_groups.position()["context"]:
            return
        losses_BS, masks_BS = loss_BS.double().cpu().numpy(), batch.loss_mask_BS.cpu().numpy() > 0
        for slices, loss_S, mask_S in zip(rows, losses_BS, masks_BS, strict=True):
            ends = np.cumsum(slices.lengths)
            for index, end in enumerate(ends.tolist()):
                own = slice(end - int(slices.lengths[index]), end)
                supervised = loss_S[own][mask_S[own]]
                if len(supervised):
                    mean = float(supervised.mean())
                    found = SliceLoss(int(slices.samples[index]), int(slices.starts[index]), len(supervised), mean)
                    self.found.append(found)


class _OneBatch:
    """The pipeline's output of one micro-batch, of which only the losses are taken."""

    def __init__(self, add: Callable[[DeviceBatch, Tensor], None], batch: DeviceBatch):
        self._add, self._batch = add, batch

    def slope(self, batch: DeviceBatch) -> None:
        """No gradient is computed."""

    def of_losses(self, loss_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Take the token losses, fp32 [1, B·S]; returns a loss of 0 in Megatron's form."""
        self._add(self._batch, loss_T)
        return loss_T.sum() * 0, torch.zeros([], dtype=torch.int, device=loss_T.device), {}

"""Rotary positions by the position of each token within its segment.

Megatron-Core rotates a packed stream segment by segment, in a Python loop that waits for the device, and with context
parallelism it assumes that each segment is split over ranks. Here each token has a row of angles, so that the whole
stream is rotated at once, whichever tokens a rank has.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor


class RotaryByPosition(RotaryEmbedding):
    """Megatron's rotary embedding, called with the positions of a stream instead of a length."""

    inv_freq: Tensor

    def get_rotary_seq_len(self, *args: Any, **others: Any) -> Tensor:
        """Give the positions, int64 [T], which Megatron's model then passes to :meth:`forward`."""
        packed = others.get("packed_seq_params", args[-1])
        return packed.positions

    def forward(self, positions: Tensor, **others: Any) -> Tensor:
        """Compute the angles of each token: int64 [T] -> fp32 [T, 1, 1, rotated elements of a head]."""
        self.inv_freq = self.inv_freq.to(positions.device)
        scaled = positions.to(self.inv_freq.dtype)
        if self.seq_len_interpolation_factor is not None:
            scaled = scaled * (1 / self.seq_len_interpolation_factor)
        angles = torch.outer(scaled, self.inv_freq)
        pairs = torch.cat((angles, angles), -1) if not self.rotary_interleaved else angles.repeat_interleave(2, -1)
        return pairs[:, None, None, :]

"""Rotary positions by the position of each token within its segment.

Megatron-Core rotates a packed stream segment by segment, in a Python loop that waits for the device, and with context
parallelism it assumes that each segment is split over ranks. Here each token has a row of angles, so that the whole
stream is rotated at once, whichever tokens a rank has. Cosines and sines are computed once for all layers of a stage,
and core attention rotates, so that they travel with the stream.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from mft_megatron.mcore.kernels.rotary import Rotation


class RotaryByPosition(RotaryEmbedding):
    """Megatron's rotary embedding, asked for the rotation of a stream's tokens instead of a table of angles."""

    inv_freq: Tensor

    def rotation(self, positions: Tensor) -> Rotation:
        """Compute the rotation of each token's queries and keys from its position, int32 or int64 [T]."""
        self.inv_freq = self.inv_freq.to(positions.device)
        scaled = positions.to(self.inv_freq.dtype)
        if self.seq_len_interpolation_factor is not None:
            scaled = scaled * (1 / self.seq_len_interpolation_factor)
        return Rotation(torch.outer(scaled, self.inv_freq), self.rotary_interleaved)

    def get_rotary_seq_len(self, *args: Any, **others: Any) -> int:
        """Give a length that is not used; Megatron's model asks for it."""
        return 0

    def forward(self, length: int, **others: Any) -> None:
        """Give Megatron's attention nothing to rotate by: core attention has the stream's rotation."""

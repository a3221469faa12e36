"""Rotary positions by the number of each token within its segment.

Megatron-Core rotates a packed stream segment by segment, in a Python loop that waits for the device, and where ranks
share a stream it takes each segment to be cut for itself. Here each token brings its own row of angles, so that the
stream is rotated at once, whatever part of it a rank has.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor


class RotaryByPosition(RotaryEmbedding):
    """Megatron's rotary embedding, asked with the positions of a stream instead of a length."""

    def get_rotary_seq_len(self, *args, **others) -> Tensor:
        """What Megatron's model then asks :meth:`forward` with: the positions, int64 [T]."""
        packed = others.get("packed_seq_params", args[-1])
        return packed.positions

    def forward(self, positions: Tensor, **others) -> Tensor:
        """Angles of each token: int64 [T] -> fp32 [T, 1, 1, rotated part of a head]."""
        inverse = self.inv_freq = self.inv_freq.to(positions.device)
        place = positions.to(inverse.dtype)
        if self.seq_len_interpolation_factor is not None:
            place = place * (1 / self.seq_len_interpolation_factor)
        angles = torch.outer(place, inverse)
        pairs = torch.cat((angles, angles), -1) if not self.rotary_interleaved else angles.repeat_interleave(2, -1)
        return pairs[:, None, None, :]

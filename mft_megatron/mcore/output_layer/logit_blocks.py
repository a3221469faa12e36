"""How many tokens' logits are held at once, and how they are laid out in memory; one rule for each kind of device."""

import dataclasses

import torch
from torch import Tensor

from mft_megatron.mcore.platform import devices


@dataclasses.dataclass(frozen=True)
class BlockRule:
    """Size and layout of a block of logits, C tokens of V vocabulary rows.

    Attributes:
        bytes: of a block's logits, at least fp32, and of their gradients in the model's dtype.
        least: tokens of a block at least.
        least_with_weight: the same where the weight has a gradient.
        even: blocks have equal numbers of tokens, to within one.
        columns: the vocabulary rows that are multiplied are rounded up to a multiple, as far as the weight has rows.
        stride: elements from one token to the next are a multiple.
    """

    bytes: int
    least: int
    least_with_weight: int
    even: bool
    columns: int
    stride: int

    def tokens(self, total: int, weight: Tensor, with_gradient: bool) -> int:
        """Choose the tokens of a block; the same on all tensor-parallel ranks.

        Args:
            total: tokens of all blocks.
            weight: [rows of this rank, H], as many rows on each rank.
            with_gradient: whether the weight's gradient is computed.
        """
        exact = torch.promote_types(weight.dtype, torch.float32).itemsize
        element = exact + (weight.dtype.itemsize if weight.dtype.itemsize < exact else 0)
        least = self.least_with_weight if with_gradient else self.least
        most = max(self.bytes // (element * weight.shape[0]), least)
        if not self.even or total <= most:
            return most
        return -(-total // -(-total // most))

    def columns_of(self, rows: int, weight: Tensor) -> int:
        """Number of the weight's rows that are multiplied, of which ``rows`` are real."""
        return min(-(-rows // self.columns) * self.columns, weight.shape[0])

    def allocate(self, tokens: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Allocate [tokens, columns] of a dtype beside ``like``, with this rule's stride."""
        stride = -(-columns // self.stride) * self.stride
        return like.new_empty(tokens, stride, dtype=dtype)[:, :columns]


# Larger products are no faster on a CPU, and products of fewer than 256 tokens are slower.
CPU = BlockRule(bytes=2**26, least=256, least_with_weight=256, even=False, columns=1, stride=1)
# Each block reads and writes the weight's whole gradient, 8 bytes an element for 2·C operations, so that an H100 (3.3
# TB/s, 600 TFLOP/s in practice) waits for memory with fewer than about 800 tokens, an A100 with fewer than 600. Matrix
# units need rows that begin at multiples of 16 bytes, and the local vocabulary may be odd (32,017; 11,905).
GPU = BlockRule(bytes=2**30, least=256, least_with_weight=2048, even=True, columns=8, stride=64)


def block_rule(weight: Tensor) -> BlockRule:
    """Choose the rule for a weight's device."""
    return GPU if devices.on_gpu(weight) else CPU

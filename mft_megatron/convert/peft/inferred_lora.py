"""The adapters of a checkpoint that a PEFT adapter corresponds to: rank, alpha, and which sources have an A in common.

In PEFT every matrix has its own A. Where several matrices are fused in one weight and their A's are equal in every
layer, the checkpoint has one A. Where Hugging Face has a fused matrix as well, and each block of B's columns is nonzero
in the rows of a single source, the checkpoint has several A's. So an adapter that lora-to-peft wrote is read back
unchanged.
"""

import math
from collections.abc import Iterable, Sequence

import torch

from mft_megatron.convert.huggingface.row_layouts import sizes_of
from mft_megatron.errors import InputError
from mft_megatron.lora import Lora, Target, num_sources

from .adapted_weights import source_blocks
from .config import PeftConfig
from .weights import PeftWeights


def infer_lora(weights: PeftWeights, config: PeftConfig) -> Lora:
    """Describe a PEFT adapter as the adapters of a checkpoint.

    Raises:
        InputError: its matrices have several ranks or alphas.
    """
    targets = tuple(_target(weights, module, positions) for module, positions in weights.positions.items())
    rank, alpha = _rank_and_alpha(weights, targets, config)
    return Lora(rank, alpha, targets, config.dropout, config.rslora)


def _rank_and_alpha(weights: PeftWeights, targets: Iterable[Target], config: PeftConfig) -> tuple[int, float]:
    """Rank and alpha of an A, which must be the same for all."""
    # lora-to-peft concatenates the A's of a fused matrix; this is the inverse
    num_parts = {t.module: len(t.parts) if len(weights.linear[t.module].hf_names) == 1 else 1 for t in targets}
    pairs = set()
    for name, module in weights.modules.items():
        count = num_parts[module.megatron]
        alpha = config.alpha_of(name) / (math.sqrt(count) if config.rslora else count)
        pairs.add((config.rank_of(name) // count, round(alpha, 9)))
    if len(pairs) > 1:
        listed = " and ".join(f"rank {rank} with alpha {alpha:g}" for rank, alpha in sorted(pairs)[:3])
        raise InputError(
            f"{weights.folder}: its matrices have several ranks or alphas ({listed}; rank_pattern, alpha_pattern), "
            "which cannot be expressed; train one with the same everywhere"
        )
    return pairs.pop()


def _target(weights: PeftWeights, module: str, positions: Sequence[int]) -> Target:
    """The target for adapters on the Hugging Face matrices of ``module`` at ``positions``."""
    hf_names, sources = weights.linear[module].hf_names, num_sources(module, weights.architecture.gated)
    if len(hf_names) == 1:
        return Target(module, sources, _parts_of_fused_matrix(weights, module, sources))
    if len(positions) == len(hf_names) and _have_same_a(weights, module, positions):
        return Target(module, sources, (tuple(range(sources)),))
    return Target(module, sources, tuple((position,) for position in positions))


def _have_same_a(weights: PeftWeights, module: str, positions: Sequence[int]) -> bool:
    """Whether the A's of several matrices are equal bit by bit in every layer."""
    for layer in range(weights.architecture.num_layers):
        first, *others = (weights.whole(weights.module(module, position, layer), "A") for position in positions)
        if not all(other.dtype == first.dtype and other.equal(first) for other in others):
            return False
    return True


def _parts_of_fused_matrix(weights: PeftWeights, module: str, sources: int) -> tuple[tuple[int, ...], ...]:
    """The parts of a target whose Hugging Face matrix is fused as well, from the columns of B that each source uses."""
    every_source = (tuple(range(sources)),)
    if sources == 1:
        return every_source
    blocks = source_blocks(module, weights.architecture, sizes_of(weights.architecture, 0))
    layers = []
    for layer in range(weights.architecture.num_layers):
        b = weights.whole(weights.module(module, 0, layer), "B")
        is_used = torch.zeros(sources, b.shape[1], dtype=torch.bool)
        for block, rows in zip(blocks, b.split([block.rows for block in blocks]), strict=True):
            is_used[block.source] |= (rows != 0).any(0)
        layers.append(is_used)
    if len({used.shape[1] for used in layers}) > 1:  # several ranks, which _rank_and_alpha refuses
        return every_source
    is_used = torch.stack(layers).any(0)  # [source, column of B]
    for count in range(sources, 1, -1):
        if is_used.shape[1] % count == 0:
            has_part = is_used.view(sources, count, -1).any(2)  # [source, part]
            if (has_part.sum(1) <= 1).all() and (has_part.sum(0) == 1).all():
                return tuple(tuple(has_part[:, part].nonzero().flatten().tolist()) for part in range(count))
    return every_source

"""Check that all weights and states of a run are finite, before they are saved and after they are loaded.

A state that is not finite makes its weight NaN in the next step, and every loss after that. Each tensor is read once,
where it is; the host waits once for all of them, and all ranks learn the result in the same collective.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mft_megatron.lora import is_adapter
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.parallel.sharded_weights import shards_in
from mft_megatron.mcore.platform import devices

from .slices import MAIN, kinds_of, read_state, slice_of_rank
from .updated_weights import main_of, parts_of, weights_of

# kinds of states of the optimizer in words
_IN_WORDS = {
    "exp_avg": "Adam's mean of gradients (exp_avg)",
    "exp_avg_sq": "Adam's mean of squared gradients (exp_avg_sq)",
    "momentum_buffer": "the momentum (momentum_buffer)",
    MAIN: "the fp32 main weight",
}


class HeldState(NamedTuple):
    """A tensor that a checkpoint holds.

    Attributes:
        weight: the weight that it is, or that it belongs to.
        kind: the kind of state of the optimizer; empty for the weight itself.
        content: its elements on this rank; any shape, of a floating-point dtype.
    """

    weight: Tensor
    kind: str
    content: Tensor


def held_states(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, with_base: bool = True
) -> Iterator[HeldState]:
    """Yield this rank's weights, and the states of those that it updates; there are none before the first step.

    Args:
        chunks: the rank's chunks of the model.
        optimizer: over all of them.
        with_base: yield all weights; otherwise those of adapters alone.
    """
    for chunk in chunks:
        for name, weight in (*chunk.module.named_parameters(), *chunk.module.named_buffers()):
            if weight.is_floating_point() and (with_base or is_adapter(name)):
                yield HeldState(weight, "", weight.detach())
    for part in parts_of(optimizer):
        if not part.optimizer.state:
            continue
        for weight in weights_of(part):
            if isinstance(part, DistributedOptimizer):
                start, end = slice_of_rank(part, weight)
                for kind in kinds_of(weight) if start < end else ():
                    yield HeldState(weight, kind, read_state(part, weight, kind))
                continue
            main = main_of(weight)
            for kind, state in part.optimizer.state[main].items():
                if kind != "step" and isinstance(state, Tensor) and state.is_floating_point():
                    yield HeldState(weight, kind, state)
            if main is not weight:
                yield HeldState(weight, MAIN, main.detach())


@torch.no_grad()
def find_non_finite(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, with_base: bool = True
) -> str | None:
    """Name a weight or state that is not finite on any rank, the same on all ranks; a collective of all ranks.

    Args:
        chunks, optimizer, with_base: as in :func:`held_states`.

    Returns:
        what it is and what it has, to be followed by "in it"; ``None`` where all are finite.
    """
    finite = _finite(state.content for state in held_states(chunks, optimizer, with_base))
    if not process_groups.sum_over_world((~finite).sum()).item():
        return None
    message = None
    if not finite.all():
        index = int((~finite).nonzero()[0])
        # the states once more, since a list of them all would hold those that were converted to fp32
        state = next(one for number, one in enumerate(held_states(chunks, optimizer, with_base)) if number == index)
        kind = "NaN" if state.content.isnan().any() else "an infinity"
        message = f"{_name(chunks, state)} has {kind}"
    return process_groups.first_of_any_rank(message)


def _finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether each of some tensors is finite, bool [tensors] on this process's device; nothing is waited for."""
    flags = [torch.ones((), dtype=torch.bool, device=devices.device())]
    for tensor in tensors:
        if tensor.numel():
            least, most = torch.aminmax(tensor)  # both are NaN where an element is
            # states in the host's memory are copied one number each
            flags.append((least.isfinite() & most.isfinite()).to(flags[0].device, non_blocking=True))
        else:
            flags.append(flags[0])
    return torch.stack(flags)[1:]


def _name(chunks: Sequence[DistributedDataParallel], state: HeldState) -> str:
    """A state's name in words, with the weight's name and layer in checkpoints."""
    weight = _weight_name(chunks, state.weight)
    return f"{_IN_WORDS.get(state.kind, state.kind)} of {weight}" if state.kind else weight


def _weight_name(chunks: Sequence[DistributedDataParallel], weight: Tensor) -> str:
    for chunk in chunks:
        for entry in chunk.module.sharded_state_dict().values():
            same = isinstance(entry, (ShardedTensor, ShardedTensorFactory)) and entry.data is weight
            for shard in shards_in([entry]) if same else ():
                layer = list(shard.global_offset[: shard.prepend_axis_num])
                return f"{entry.key} {layer}" if layer else entry.key
    return "a buffer of the model"

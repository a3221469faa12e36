"""The kernel of attention that ``auto`` takes: the same on all ranks of a run.

Each rank looks for packages and tries kernels by itself, and nodes may differ. The log names the kernel of one rank,
and a run would depend on the node that computes which part of it.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from mft_megatron.arguments.values.attention import AttentionShape
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform import devices

from .backends import PREFERRED, choose, leave_out


def agree(backend: str, shape: AttentionShape) -> None:
    """Leave out what a rank cannot take, until all take the same; for ``auto`` on a GPU a collective of all ranks.

    Args:
        backend: ``--attention-backend``.
        shape: of the attention, the same on all ranks.
    """
    if backend != "auto" or devices.device().type != "cuda":
        return
    while True:
        choice = choose(backend, shape)
        choices = process_groups.of_all_ranks((choice.preferred_as, dict(choice.why_not)))
        names = [name for name, _ in choices]
        last = max(names, key=PREFERRED.index)
        rank, reasons = names.index(last), choices[names.index(last)][1]
        others = set(names) - {last}
        if not others:
            return
        for name in others:
            leave_out(name, f"is not taken, since on rank {rank} it {reasons.get(name, 'has no GPU of its kind')}")

"""Whether small functions of Megatron-Core are compiled, and kernels in Triton launched: the same on all ranks.

Ranks that hold the same tensor compute it in the same way, or they would differ in its rounding.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from mft_megatron.arguments.table import Arguments
from mft_megatron.mcore.kernels import triton_support
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform import devices, jit_fuser

_problem: str | None = None


def choose_compiler(arguments: Arguments) -> None:
    """Compile them on CUDA unless ``--disable-jit-fuser`` is given or a rank cannot; a collective of all ranks there.

    Kernels in Triton are launched there unless a rank cannot.
    """
    global _problem
    if devices.device().type != "cuda":
        return
    triton_support.do_without(process_groups.first_of_any_rank(triton_support.obstacle(devices.device())))
    wanted = arguments.fusions.jit_fuser
    _problem = process_groups.first_of_any_rank(jit_fuser.problem(devices.device())) if wanted else None
    jit_fuser.enable(wanted and _problem is None)


def why_not(arguments: Arguments) -> str | None:
    """Say in words for the log why they are not compiled; ``None`` where they are, and on the CPU."""
    if not devices.HAS_CUDA:
        return None
    if not arguments.fusions.jit_fuser:
        return "not compiled (--disable-jit-fuser)"
    if _problem is None:
        return None
    return (
        f"not compiled, since torch.compile does not work on every node ({_problem}): slower; install Triton and a C "
        "compiler there, or give --disable-jit-fuser"
    )

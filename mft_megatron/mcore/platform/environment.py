"""Environment variables that CUDA and Transformer Engine read, set for this process before they do."""

import ctypes
import warnings
from collections.abc import MutableMapping

from mft_megatron.errors import InputError

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
BLACKWELL = (10, 0)
ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def limit_connections(environment: MutableMapping[str, str]) -> None:
    """Let kernels of all streams go through one hardware queue, up to Hopper; a value of the user's stays.

    Megatron-Core launches a collective before the matrix product that it overlaps with, and one queue keeps that order.
    Blackwell needs no such limit. The driver reads the variable when it is initialised, which already
    ``torch.cuda.is_available`` does, so CUDA cannot be asked for the GPU's capability first.
    """
    if CONNECTIONS in environment:
        return
    capability = least_capability()
    if capability is None or capability < BLACKWELL:
        environment[CONNECTIONS] = "1"
    else:
        # Megatron-Core up to 0.19 recommends 1 on every GPU, once on each rank
        warnings.filterwarnings("ignore", message=f"When using .* environment variable {CONNECTIONS}")


def least_capability() -> tuple[int, int] | None:
    """Least compute capability of this machine's GPUs, major and minor, without initialising CUDA.

    Returns:
        ``None`` where there is no GPU, or NVIDIA's management library (NVML) cannot say.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return None
        return min(filter(None, (_capability(nvml, index) for index in range(count.value))), default=None)
    finally:
        nvml.nvmlShutdown()


def _capability(nvml: ctypes.CDLL, index: int) -> tuple[int, int] | None:
    """Compute capability of a GPU; ``None`` where the library cannot say, as for a GPU of somebody else's."""
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != 0:
        return None
    if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) != 0:
        return None
    return major.value, minor.value


def allow_deterministic_algorithms_only(environment: MutableMapping[str, str]) -> None:
    """Let cuBLAS, NCCL and Transformer Engine take algorithms that give the same bits in each run.

    They read their variables when they are first used. Values of the user's for cuBLAS and NCCL stay.

    Raises:
        InputError: the user asks NCCL for sums in the order in which values arrive.
    """
    algorithms = environment.get("NCCL_ALGO", "^NVLS")
    if "NVLS" in algorithms.upper() and "^" not in algorithms:
        raise InputError(
            f"--deterministic-mode with NCCL_ALGO={algorithms} in the environment: the switches of NVLink sum in the "
            "order in which values arrive; unset NCCL_ALGO, or leave the option out"
        )
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # reductions in the switches of NVLink sum in the order in which values arrive
    environment.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    environment["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"


def set_aside_attention(environment: MutableMapping[str, str]) -> str | None:
    """Remove the variables by which Transformer Engine chooses attention: Megatron-Core sets them for each model.

    It asserts that they are unset or have the values that it is going to set.

    Returns:
        a line for the log if there were any, else ``None``.
    """
    found = [f"{name}={environment.pop(name)}" for name in ATTENTION if name in environment]
    if not found:
        return None
    return f"{', '.join(found)} of the environment set aside: --attention-backend chooses the kernel of attention"

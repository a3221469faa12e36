"""The device of this process: CPU with gloo, CUDA with NCCL, or in a dry run a simulated GPU.

All other files ask :func:`device`, :func:`capability`, :func:`on_gpu` and :func:`backend`. Patches of Megatron-Core and
torch are in :mod:`.patches`.
"""

import importlib.metadata
import os
import sys
import warnings

import psutil
import torch

from mft_megatron.errors import InputError
from mft_megatron.launcher import gpu_index

from . import environment, patches, versions
from .releases import silence_notices
from .simulated_gpu import SimulatedGPU

# before the next line initialises the driver, which reads it
environment.limit_connections(os.environ)
# whether this process takes the code paths of CUDA devices; read it as an attribute of this module: simulate() sets it
HAS_CUDA = torch.cuda.is_available()
_simulated: SimulatedGPU | None = None


def simulate(gpu: SimulatedGPU) -> None:
    """Let this process take the code paths of a GPU on tensors without content; before Megatron-Core is imported."""
    global HAS_CUDA, _simulated
    HAS_CUDA, _simulated = True, gpu


def prepare() -> None:
    """Make ``import megatron.core`` work on this machine; call before the first such import.

    Raises:
        InputError: an installed release cannot work, or Transformer Engine is installed in part, which breaks
            Megatron-Core's own import.
    """
    for warning in versions.check_installed():
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    silence_notices()
    with warnings.catch_warnings():
        # Megatron-Core warns that Transformer Engine and apex are missing; this package works without them.
        warnings.simplefilter("ignore")
        try:
            if _simulated is not None:
                patches.apply_simulated(_simulated)
            elif HAS_CUDA:
                patches.apply_with_cuda()
            else:
                patches.apply_without_cuda()
            import megatron.core.models.gpt.gpt_layer_specs
            import megatron.core.optimizer  # noqa: F401
        except Exception as error:
            if not _installed("transformer-engine"):
                raise
            raise InputError(
                f"Transformer Engine is installed only in part ({type(error).__name__}: {error}); install it whole "
                "with pip install --no-build-isolation 'transformer-engine[pytorch]', or uninstall transformer-engine"
            ) from error


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def device() -> torch.device:
    """The device of this process: the GPU of its local rank, the CPU, or ``meta`` for a simulated GPU.

    Raises:
        InputError: there is no GPU for this process, or nothing says which.
    """
    if _simulated is not None:
        return torch.device("meta")
    if not HAS_CUDA:
        return torch.device("cpu")
    return torch.device("cuda", gpu_index(os.environ, torch.cuda.device_count()))


def capability() -> tuple[int, int]:
    """Compute capability of this process's GPU, real or simulated, major and minor."""
    return torch.cuda.get_device_capability(device()) if _simulated is None else _simulated.capability


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on a GPU, real or simulated."""
    return tensor.is_cuda or (_simulated is not None and tensor.is_meta)


def backend(choice: str = "auto") -> str:
    """The process-group backend for ``--distributed-backend``.

    Raises:
        InputError: the choice is nccl, and there is no CUDA device.
    """
    if choice == "nccl" and not HAS_CUDA:
        raise InputError("--distributed-backend nccl: no CUDA device here; use gloo or leave the option out")
    if choice == "auto":
        return "nccl" if HAS_CUDA else "gloo"
    return choice


def use_device() -> None:
    """Bind this process to its device."""
    if HAS_CUDA and _simulated is None:
        torch.cuda.set_device(device())


def make_deterministic() -> None:
    """Let this process compute the same bits in each run, before it uses its device.

    On a CPU, too, torch has operations whose threads add in the order in which they come, such as writes that
    accumulate by index. An operation that has no deterministic algorithm raises torch's RuntimeError, which names it.

    Raises:
        InputError: the environment asks for an algorithm of NCCL whose sums differ from run to run.
    """
    if HAS_CUDA:
        environment.allow_deterministic_algorithms_only(os.environ)
        # the first run of a shape would otherwise choose an algorithm by its time
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # no code here reads memory that was not written, so filling it would only cost time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def synchronize() -> None:
    """Wait for the device, so that a clock measures its work."""
    if HAS_CUDA:
        torch.cuda.synchronize()


def memory() -> dict[str, int]:
    """Memory of this process in bytes: on a GPU as allocated and reserved by torch, otherwise resident."""
    if HAS_CUDA:
        return {
            "allocated": torch.cuda.memory_allocated(),
            "max-allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
        }
    usage = psutil.Process().memory_info()
    return {"resident": usage.rss}


def describe() -> str:
    """Describe device and versions in a line, for the log."""
    import megatron.core

    name = torch.cuda.get_device_name(device()) if HAS_CUDA else f"CPU, {torch.get_num_threads()} thread(s) a rank"
    return f"{name}; torch {torch.__version__}, Megatron-Core {megatron.core.__version__}"

"""Whether this Python can run ``make test-gpu`` and ``make bench-gpu``: a CUDA torch, and packages that need no build.

Nothing is installed. What is missing is named with the command that installs it, and leaves torch as it is. The C++
extension is built in place where it is not there.
"""

import importlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTENSIONS = ("mft_megatron.data._sample_index", "mft_megatron.data._mapped_files")
# module and distribution; protobuf and tensorboard write the log of a run
NEEDED = {
    "numpy": "numpy",
    "megatron.core": "megatron-core",
    "packaging": "packaging",
    "psutil": "psutil",
    "yaml": "pyyaml",
    "jinja2": "jinja2",
    "google.protobuf": "protobuf",
    "tensorboard": "tensorboard",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}
OTHER_PYTHON = "name a Python that has a CUDA torch, as in: make test-gpu GPU_PYTHON=/path/to/python"
TO_BUILD = {"setuptools": "setuptools", "pybind11": "pybind11"}


def main():
    """Check, build, and describe the machine; exits with a line where something is missing."""
    sys.path.insert(0, str(ROOT))
    try:
        import torch
    except ImportError:
        sys.exit(f"error: {sys.executable} has no torch; {OTHER_PYTHON}")
    if not torch.cuda.is_available():
        sys.exit(
            f"error: torch {torch.__version__} of {sys.executable} finds no CUDA device; run this on a machine with a "
            f"GPU, or {OTHER_PYTHON}"
        )
    refuse_missing(NEEDED)
    if not all(map(can_import, EXTENSIONS)):
        refuse_missing(TO_BUILD)
        print("building the C++ extensions", flush=True)
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)
    from mft_megatron.mcore.platform import devices, patched  # noqa: F401  (refuses releases that cannot work)
    from mft_megatron.mcore.platform.optional_packages import BITSANDBYTES, FLASH_ATTN, TRANSFORMER_ENGINE, missing

    print(f"{torch.cuda.device_count()} × {devices.describe()}")
    for package in (TRANSFORMER_ENGINE, FLASH_ATTN, BITSANDBYTES):
        print(f"{package.name}: {missing(package) or 'is used'}")


def refuse_missing(modules):
    """End with a line that names distributions whose modules cannot be imported."""
    absent = [distribution for module, distribution in modules.items() if not can_import(module)]
    if absent:
        sys.exit(
            f"error: {sys.executable} lacks {', '.join(absent)}; install them beside its torch with "
            f"{sys.executable} -m pip install --no-deps {' '.join(absent)}"
        )


def can_import(module):
    """Whether a module can be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()

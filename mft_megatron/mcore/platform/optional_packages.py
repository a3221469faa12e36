"""Packages of CUDA kernels that may be missing, and in what way."""

import dataclasses
import importlib

from packaging.version import Version


@dataclasses.dataclass(frozen=True)
class Package:
    """``name``: pip's. ``module``: what is used of it. ``least``: the first version that has what is used here."""

    name: str
    module: str
    least: str
    install: str


# flash-attn aligns masks at the end since 2.1 and has windows since 2.3; the bounds are those of the extra "gpu"
FLASH_ATTN = Package(
    "flash-attn", "flash_attn", "2.7.3", "pip install --no-build-isolation 'flash-attn>=2.7.3,<=2.8.3'"
)
TRANSFORMER_ENGINE = Package(
    "transformer-engine",
    "transformer_engine.pytorch",
    "2.9",
    "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9,<2.12'",
)
# its kernels are operators of torch since then
BITSANDBYTES = Package("bitsandbytes", "bitsandbytes", "0.46", "pip install 'bitsandbytes>=0.46'")


def missing(package: Package) -> str | None:
    """Why a package cannot be used and how to get it, in words that follow what needs it; ``None`` where it can."""
    try:
        importlib.import_module(package.module)
        version = getattr(importlib.import_module(package.module.partition(".")[0]), "__version__", None)
    except Exception as error:  # symbols of another torch, a missing cuDNN: not only ImportError
        absent = isinstance(error, ModuleNotFoundError) and error.name == package.module.partition(".")[0]
        if absent:
            return f"needs {package.name}, which is not installed: {package.install}"
        first = (str(error).strip() or "no further word").splitlines()[0][:200]
        return (
            f"needs {package.name}, which is installed and cannot be imported ({type(error).__name__}: {first}): build "
            f"it anew for this torch with {package.install}"
        )
    if version is None or Version(version) < Version(package.least):
        return (
            f"needs {package.name} {package.least} or newer, and {version or 'a version without a number'} is "
            f"installed: {package.install}"
        )
    return None


def importable(module: str) -> bool:
    """Whether a compiled module is there and can be loaded."""
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True

"""Optional packages with CUDA kernels: whether they are installed, recent enough and importable."""

import dataclasses
import importlib

from packaging.version import Version

from mft_megatron.errors import in_a_line


@dataclasses.dataclass(frozen=True)
class Package:
    """An optional package.

    Attributes:
        name: of the distribution.
        module: the module that is used.
        least: the first version that has all that is used here.
        install: the command that installs it.
    """

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
    "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9'",
)
# since then its kernels are torch operators
BITSANDBYTES = Package("bitsandbytes", "bitsandbytes", "0.46", "pip install 'bitsandbytes>=0.46'")


def missing(package: Package) -> str | None:
    """Say why a package cannot be used and how to install it; ``None`` where it can be used.

    The text follows the name of an option, as in "--attention-backend flash needs flash-attn, which is not installed".
    """
    try:
        importlib.import_module(package.module)
        version = getattr(importlib.import_module(package.module.partition(".")[0]), "__version__", None)
    except Exception as error:  # not only ImportError: symbols of another torch, a missing cuDNN
        absent = isinstance(error, ModuleNotFoundError) and error.name == package.module.partition(".")[0]
        if absent:
            return f"needs {package.name}, which is not installed: {package.install}"
        return (
            f"needs {package.name}, which is installed and cannot be imported ({in_a_line(error)}): build it again for "
            f"this torch with {package.install}"
        )
    if version is None or Version(version) < Version(package.least):
        return (
            f"needs {package.name} {package.least} or newer, and {version or 'an unknown version'} is "
            f"installed: {package.install}"
        )
    return None


def importable(module: str) -> bool:
    """Whether a module is installed and can be loaded, which for a compiled one depends on this torch."""
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True

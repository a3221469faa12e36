"""Build the C++ extensions; everything else about the package is in pyproject.toml.

``MFT_CXX_FLAGS``: further compiler and linker flags, as ``make sanitize`` gives them.
"""

import os
import shlex
import shutil
import sys

import setuptools

try:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:
    Pybind11Extension = build_ext = None

FLAGS = shlex.split(os.environ.get("MFT_CXX_FLAGS", ""))
COMPILER = "install a C++17 compiler (on Debian and Ubuntu: apt install g++) or set CXX to one"


def stop(problem, remedy):
    """End the build with one line."""
    sys.exit(f"error: mft_megatron cannot be built: {problem}; {remedy}")


# pip reads the requirements of [build-system] only where it builds in an environment of its own.
if int(setuptools.__version__.partition(".")[0]) < 77:
    stop(
        f"setuptools {setuptools.__version__} is too old",
        "pip install 'setuptools>=77.0.3', or leave out --no-build-isolation",
    )
if build_ext is None:
    stop("pybind11 is not installed", "pip install 'pybind11>=2.13.6,<4', or leave out --no-build-isolation")


class BuildExtension(build_ext):
    """Compile, or say in one line what is missing."""

    def build_extensions(self):
        command = getattr(self.compiler, "compiler_cxx", None)  # None: not a compiler of Unix
        if command and shutil.which(command[0]) is None:
            stop(f"there is no C++ compiler {command[0]}", COMPILER)
        try:
            super().build_extensions()
        except (setuptools.errors.CompileError, setuptools.errors.LinkError):
            stop(
                f"the C++ compiler {command[0] if command else ''} failed, see above",
                f"{COMPILER}, and Python's headers (apt install python3-dev)",
            )


def extension(name, *sources):
    """One of the modules in C++ of ``mft_megatron.data``, from its sources and the header of the last one."""
    files = [f"csrc/{source}.cpp" for source in sources]
    return Pybind11Extension(
        f"mft_megatron.data.{name}",
        files,
        depends=[f"csrc/{sources[-1]}.hpp"],
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra", *FLAGS],
        extra_link_args=FLAGS,
    )


setuptools.setup(
    ext_modules=[
        extension("_sample_index", "bindings", "orders", "sample_index"),
        extension("_mapped_files", "mapped_files_bindings", "mapped_files"),
    ],
    cmdclass={"build_ext": BuildExtension},
)

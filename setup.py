"""Build the C++ sample index; everything else about the package is in pyproject.toml.

``MFT_CXX_FLAGS``: further compiler and linker flags, as ``make sanitize`` gives them.
"""

import os
import shlex

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

FLAGS = shlex.split(os.environ.get("MFT_CXX_FLAGS", ""))

setup(
    ext_modules=[
        Pybind11Extension(
            "mft_megatron.data._sample_index",
            ["csrc/bindings.cpp", "csrc/sample_index.cpp"],
            depends=["csrc/sample_index.hpp"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", *FLAGS],
            extra_link_args=FLAGS,
        )
    ],
    cmdclass={"build_ext": build_ext},
)

"""Builds the C++ sample index; everything else about the package stands in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "mft_megatron.data._sample_index",
            ["csrc/bindings.cpp", "csrc/sample_index.cpp"],
            depends=["csrc/sample_index.hpp"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)

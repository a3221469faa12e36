# mft_megatron on a vendor's image, which keeps its own torch, Transformer Engine and flash-attn; see docs/INSTALL.md.
#
#   docker build --build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3 -t mft-megatron .
#
# BASE_IMAGE: any image with Python 3.10-3.13, pip, a C++ compiler and torch >= 2.6; of NVIDIA's, 25.02 or newer.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE_IMAGE}

WORKDIR /opt/mft_megatron

# What must stay as it is: pip refuses to change these versions, and the last step compares them.
RUN pip list --format=freeze | grep -iE '^(torch|pytorch|triton|transformer.engine|flash.attn|apex|nvidia|cuda)' > kept.txt \
    && grep '^torch==' kept.txt

COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE pretrain_mft.py ./
COPY csrc csrc
COPY mft_megatron mft_megatron
COPY tools tools
COPY tests/packaging/try_extension.py tests/packaging/import_every_module.py tests/packaging/

# Without build isolation: the environment that pip makes for it would not see the image's own packages.
RUN pip install --no-cache-dir "setuptools>=77.0.3" "pybind11>=2.13.6,<4" \
    && pip install --no-cache-dir --no-build-isolation -c kept.txt -e .

RUN pip list --format=freeze | grep -iE '^(torch|pytorch|triton|transformer.engine|flash.attn|apex|nvidia|cuda)' | diff kept.txt - \
    && python tests/packaging/try_extension.py

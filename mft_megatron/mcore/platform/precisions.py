"""The floating-point formats of weights, under every name that options and files use for them."""

import dataclasses
import math
from collections.abc import Iterable

import torch


@dataclasses.dataclass(frozen=True)
class Precision:
    """A format under its names.

    Attributes:
        name: in options and checkpoint descriptions.
        dtype: in torch.
        huggingface: in ``config.json``.
        safetensors: in the header of a file.
    """

    name: str
    dtype: torch.dtype
    huggingface: str
    safetensors: str


PRECISIONS = (
    Precision("fp32", torch.float32, "float32", "F32"),
    Precision("bf16", torch.bfloat16, "bfloat16", "BF16"),
    Precision("fp16", torch.float16, "float16", "F16"),
)
DTYPES = {precision.name: precision.dtype for precision in PRECISIONS}
BY_DTYPE = {precision.dtype: precision for precision in PRECISIONS}


def model_dtype(weights: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> torch.dtype:
    """Dtype of a model with weights of these shapes and dtypes: that of its largest weight.

    Real models are of one dtype, or keep small weights such as norms and routers in fp32 beside matrices of 16 bits.
    """
    return max(weights, key=lambda weight: math.prod(weight[0]))[1]

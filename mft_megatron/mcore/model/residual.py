"""The dtype of the residual stream: that of the weights, or with ``--fp32-residual-connection`` fp32."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import functools

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

from mft_megatron.arguments.table import Arguments
from mft_megatron.errors import InputError
from mft_megatron.mcore.platform.precisions import DTYPES


def residual_options(arguments: Arguments) -> dict[str, object]:
    """Fields of Megatron-Core's configuration for the residual stream, which pipeline stages send to each other.

    Raises:
        InputError: this release of Megatron-Core cannot keep it in fp32.
    """
    wanted = arguments.precision.fp32_residual_connection
    if wanted and not _keeps_fp32():
        raise InputError(
            "--fp32-residual-connection: the installed Megatron-Core keeps only the embedding in fp32 and casts the "
            "residual stream at the first layer; install 'megatron-core>=0.17,<0.20', or leave the option out"
        )
    return {
        "fp32_residual_connection": wanted,
        "pipeline_dtype": torch.float32 if wanted else DTYPES[arguments.precision.name],
    }


@functools.cache
def _keeps_fp32() -> bool:
    """Whether Megatron-Core adds the output of a layer's part in bf16 to a residual stream in fp32 in fp32."""
    output, residual = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    return get_bias_dropout_add(False, False)((output, None), residual, 0.0).dtype == torch.float32

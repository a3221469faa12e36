"""Operations that one CUDA kernel computes together."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class FusionArguments:
    """Used on CUDA if the package of a kernel is installed; the log says which. The CPU has none.

    Megatron's other fusions do not apply: attention, norms, rotary embedding and token losses are not Megatron's here.
    """

    bias_swiglu_fusion: bool = option(
        True,
        "Compute bias and SwiGLU separately. GELU is never fused: it would be a different function (tanh) than on "
        "the CPU.",
        flag="--no-bias-swiglu-fusion",
    )
    bias_dropout_fusion: bool = option(
        True, "Compute bias, dropout and residual separately.", flag="--no-bias-dropout-fusion"
    )
    gradient_accumulation_fusion: bool = option(
        True,
        "Accumulate gradients of weights in a separate kernel instead of in the matrix product. The latter needs "
        "apex, built with --cuda_ext.",
        flag="--no-gradient-accumulation-fusion",
    )

"""Operations that CUDA kernels compute in one."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class FusionArguments:
    """In use on CUDA where the package of a kernel is there; the log says which. On the CPU there are none.

    Megatron's other fusions have nothing to fuse here: attention, norms, rotary embedding and token losses are not
    Megatron's.
    """

    bias_swiglu_fusion: bool = option(
        True,
        "Bias and SwiGLU apart. That of GELU is never fused: it would be another function (tanh) than on the CPU.",
        flag="--no-bias-swiglu-fusion",
    )
    bias_dropout_fusion: bool = option(True, "Bias, dropout and residual apart.", flag="--no-bias-dropout-fusion")
    gradient_accumulation_fusion: bool = option(
        True,
        "Add gradients of weights to their sum in a kernel of its own, instead of in the matrix product. That one "
        "needs apex, built with --cuda_ext.",
        flag="--no-gradient-accumulation-fusion",
    )

"""Operations that one CUDA kernel computes together."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class FusionArguments:
    """Used on CUDA; the log says which. The CPU has that of gradients alone, in bf16 and fp16.

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
    jit_fuser: bool = option(
        True,
        "Do not compile small functions of Megatron-Core with torch.compile. Otherwise they are compiled at the first "
        "step where that works on every node, which needs Triton and a C compiler; the log says if not.",
        flag="--disable-jit-fuser",
    )
    gradient_accumulation_fusion: bool = option(
        True,
        "Add gradients of linear layers' weights to their sums in a separate kernel, rounded to bf16 or fp16 before, "
        "instead of in the matrix product. With torch before 2.10 the latter takes apex where that is installed, else "
        "two operations, before 2.8 with rounding.",
        flag="--no-gradient-accumulation-fusion",
    )

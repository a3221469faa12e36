"""What Transformer Engine computes, and fp8."""

import dataclasses

from mft_megatron.options import option

# Recipes of fp8, and the number that both dimensions of a matrix must be a multiple of.
FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


@dataclasses.dataclass(frozen=True)
class TransformerEngineArguments:
    """Transformer Engine needs CUDA and is no dependency; fp8 is matrix products in 8 bits, with --bf16 around them."""

    transformer_impl: str = option(
        "local",
        "Whose linear layers and norms. Unlike in Megatron the default is local, Megatron-Core's own linear layers and "
        "this project's norms, which run everywhere. transformer_engine: its fused norm and linear layers, with the "
        "same checkpoints. --attention-backend is another choice, of its own.",
        choices=("local", "transformer_engine"),
    )
    fp8_format: str | None = option(
        None,
        "Matrix products of the layers in fp8: e4m3 everywhere, or hybrid with e5m2 for gradients. Needs --bf16 and "
        "--transformer-impl transformer_engine.",
        choices=("e4m3", "hybrid"),
    )
    fp8_recipe: str = option(
        "delayed",
        "How fp8 numbers are scaled. delayed: each tensor by what it was in steps before. tensorwise: by what it is. "
        "blockwise: each block of 128 (compute capability 9.0). mxfp8: each 32 (10.0).",
        choices=tuple(FP8_MULTIPLES),
    )
    fp8_margin: int = option(0, "Exponents left free above the largest number, with --fp8-recipe delayed.", at_least=0)
    fp8_amax_history_len: int = option(
        1, "Micro-batches remembered by --fp8-recipe delayed. Transformer Engine's own default is 1024.", at_least=1
    )
    fp8_amax_compute_algo: str = option(
        "most_recent", "Which of the remembered sizes --fp8-recipe delayed scales by.", choices=("most_recent", "max")
    )
    fp8_wgrad: bool = option(True, "Gradients of weights in bf16, with --fp8-recipe delayed.", flag="--no-fp8-wgrad")
    first_last_layers_bf16: bool = option(
        False, "Leave the first and last layers in bf16; not with --fp8-recipe delayed."
    )
    num_layers_at_start_in_bf16: int = option(1, "How many first layers --first-last-layers-bf16 means.", at_least=0)
    num_layers_at_end_in_bf16: int = option(1, "How many last layers --first-last-layers-bf16 means.", at_least=0)
    fp8_param_gather: bool = option(
        False, "Refused: weights are drawn, loaded and gathered in bf16, and converted where they are used."
    )

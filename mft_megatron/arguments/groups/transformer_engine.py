"""Options of Transformer Engine and fp8."""

import dataclasses

from mft_megatron.options import option

# Recipes of fp8, and the number that both dimensions of a matrix must be a multiple of.
FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


@dataclasses.dataclass(frozen=True)
class TransformerEngineArguments:
    """Transformer Engine needs CUDA and is optional. With fp8 matrix products are in 8 bits and the rest in --bf16."""

    transformer_impl: str = option(
        "local",
        "Implementation of linear layers and norms. Unlike in Megatron the default is local: Megatron-Core's linear "
        "layers and this project's norms, which run everywhere. transformer_engine: its fused norm and linear "
        "layers, with the same checkpoints. --attention-backend is independent of it.",
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
        "How fp8 numbers are scaled. delayed: each tensor by its size in earlier steps. tensorwise: by its current "
        "size. blockwise: each block of 128 elements (compute capability 9.0). mxfp8: each 32 elements (10.0).",
        choices=tuple(FP8_MULTIPLES),
    )
    fp8_margin: int = option(
        0, "Exponents to keep free above the largest number, with --fp8-recipe delayed.", at_least=0
    )
    fp8_amax_history_len: int = option(
        1, "Micro-batches remembered by --fp8-recipe delayed. Transformer Engine's default is 1024.", at_least=1
    )
    fp8_amax_compute_algo: str = option(
        "most_recent", "Which of the remembered sizes --fp8-recipe delayed uses.", choices=("most_recent", "max")
    )
    fp8_wgrad: bool = option(True, "Gradients of weights in bf16, with --fp8-recipe delayed.", flag="--no-fp8-wgrad")
    first_last_layers_bf16: bool = option(
        False, "Keep the first and last layers in bf16; not with --fp8-recipe delayed."
    )
    num_layers_at_start_in_bf16: int = option(1, "Number of first layers for --first-last-layers-bf16.", at_least=0)
    num_layers_at_end_in_bf16: int = option(1, "Number of last layers for --first-last-layers-bf16.", at_least=0)
    fp8_param_gather: bool = option(
        False, "Refused: weights are initialised, loaded and gathered in bf16, and converted where they are used."
    )

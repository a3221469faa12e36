"""Number formats of weights, gradients and optimizer states."""

import dataclasses

from mft_megatron.options import option

# Megatron's names of the dtypes in which Transformer Engine can store optimizer states.
STATE_DTYPES = ("fp32", "fp16", "bf16", "fp8")


@dataclasses.dataclass(frozen=True)
class MixedPrecisionArguments:
    """The default is fp32."""

    fp16: bool = option(
        False, "float16 weights and activations, with fp32 main weights and a loss scale. For GPUs without bfloat16."
    )
    bf16: bool = option(False, "bfloat16 weights and activations, with fp32 main weights.")
    accumulate_allreduce_grads_in_fp32: bool = option(
        False,
        "Accumulate and reduce gradients in fp32; always on with --bf16 (without --grad-reduce-in-bf16), as in "
        "Megatron. With --fp16 the default is off: gradients are fp16.",
    )
    grad_reduce_in_bf16: bool = option(
        False,
        "Accumulate and reduce gradients of a --bf16 run in bfloat16: half the memory and traffic, less accurate.",
    )
    loss_scale: float | None = option(
        None,
        "A constant loss scale instead of the dynamic one of --fp16. Unlike in Megatron a step that overflows ends "
        "the run, because the scale cannot be lowered.",
        above=0,
    )
    initial_loss_scale: float = option(2.0**32, "The dynamic loss scale of the first step.", above=0)
    min_loss_scale: float = option(
        1.0, "The lowest dynamic loss scale; a step that overflows even with it ends the run.", above=0
    )
    loss_scale_window: float = option(
        1000.0, "The dynamic loss scale is doubled after this many steps in a row without overflow.", at_least=1
    )
    hysteresis: int = option(
        2, "The dynamic loss scale is halved from this many overflows on, counted again when it is doubled.", at_least=1
    )
    use_precision_aware_optimizer: bool = option(
        False,
        "Keep states of the distributed optimizer in the dtypes given below. Needs Transformer Engine's fused Adam, or "
        "--optimizer-cpu-offload.",
    )
    main_grads_dtype: str = option(
        "fp32", "Dtype of gradients, with --use-precision-aware-optimizer.", choices=("fp32", "bf16")
    )
    main_params_dtype: str = option(
        "fp32", "Dtype of main weights, with --use-precision-aware-optimizer.", choices=("fp32", "fp16")
    )
    exp_avg_dtype: str = option(
        "fp32", "Dtype of Adam's first moment, with --use-precision-aware-optimizer.", choices=STATE_DTYPES
    )
    exp_avg_sq_dtype: str = option(
        "fp32", "Dtype of Adam's second moment, with --use-precision-aware-optimizer.", choices=STATE_DTYPES
    )
    fp32_residual_connection: bool = option(
        False,
        "Keep the residual stream in fp32 between layers and pipeline stages, with --bf16 or --fp16. Refused with "
        "Megatron-Core 0.16, which keeps only the embedding in fp32.",
    )

    @property
    def name(self) -> str:
        """fp32, bf16 or fp16."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether a step may overflow, be skipped, and lower the loss scale."""
        return self.fp16 and self.loss_scale is None

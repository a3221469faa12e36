"""Runs that a dry run cannot simulate, each with the reason."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.errors import InputError


def refuse_not_simulated(arguments: Arguments) -> None:
    """Refuse options whose code cannot run without a GPU, instead of reporting what other code needs.

    Raises:
        InputError: the first of them.
    """
    engine, training = arguments.transformer_engine, arguments.training
    reasons = {
        f"--fp8-format {engine.fp8_format}: products in fp8 are Transformer Engine's, whose kernels need a GPU; "
        "without it weights and activations are those of bf16": engine.fp8_format is not None,
        "--transformer-impl transformer_engine: its kernels need a GPU; the local layers have the same weights, "
        "gradients and states": engine.transformer_impl == "transformer_engine",
        "--optimizer-cpu-offload: which part of the states is on the GPU at a time depends on its speed": (
            training.optimizer_cpu_offload
        ),
        "--use-precision-aware-optimizer: it is Transformer Engine's, whose kernels need a GPU": (
            arguments.precision.use_precision_aware_optimizer
        ),
        "--skip-train: takes no step that could be reported": arguments.validation.skip_train,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"--dry-run cannot simulate {reason}; leave it out")

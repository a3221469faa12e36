"""The model of a certificate: a checkpoint with the kernels of its run, or a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path

from mft_megatron.arguments.config_file import read_config_file
from mft_megatron.arguments.megatron_only import MEGATRON_ONLY
from mft_megatron.arguments.table import GROUPS
from mft_megatron.convert.serving.one_process import OpenedModel, open_model
from mft_megatron.errors import InputError
from mft_megatron.options import Given
from mft_megatron.run_folder.description import CheckpointRef
from mft_megatron.run_folder.names import CONFIG

# options of a run that decide how its forward pass is computed
KERNELS = (
    *("attention_backend", "transformer_impl", "cross_entropy_impl", "moe_router_dtype"),
    *("fp32_residual_connection", "bias_swiglu_fusion", "bias_dropout_fusion"),
)


def options_of_run(checkpoint: CheckpointRef) -> Given:
    """Read the options of the run that wrote a checkpoint; none where its folder has no configuration."""
    file = checkpoint.path.parent / CONFIG
    return read_config_file(str(file), GROUPS, MEGATRON_ONLY)[0] if file.is_file() else {}


def refuse_coupled_samples(checkpoint: CheckpointRef, run: Given) -> None:
    """Check that samples of a row do not share anything by design.

    Args:
        checkpoint: of the run, for the message.
        run: its options.

    Raises:
        InputError: experts of the run choose tokens by comparing those of all samples.
    """
    capacity = run.get("moe_expert_capacity_factor")
    reason = None
    if capacity is not None and capacity >= 0:
        reason = f"--moe-expert-capacity-factor {capacity:g}"
    if "sinkhorn" in run.get("moe_router_load_balancing_type", ()):
        reason = "--moe-router-load-balancing-type sinkhorn"
    if reason is not None:
        raise InputError(
            f"--load {checkpoint.path}: its run has {reason}, so the experts of a token depend on the other samples of "
            "the row by design; nothing to certify"
        )


def open_run_model(
    hf: str | None,
    checkpoint: CheckpointRef | None,
    run: Given,
    dtype: str,
    data: Mapping[str, object],
    kernels: Mapping[str, object],
) -> OpenedModel:
    """Open the model of a certificate in this process.

    Args:
        hf: Hugging Face folder: the model, or the one that adapters were trained with.
        checkpoint: takes precedence.
        run: options of its run.
        dtype: precision of the model: fp32, bf16 or fp16.
        data: ``data_path`` and ``seq_length``.
        kernels: options of :data:`KERNELS` that replace those of the run; ``None`` does not.

    Raises:
        InputError: the model cannot be used.
    """
    chosen = {name: run[name] for name in KERNELS if name in run}
    if dtype == "fp32":
        chosen.pop("fp32_residual_connection", None)
    chosen |= {name: value for name, value in kernels.items() if value is not None}
    backend = chosen.get("attention_backend", "auto")
    if dtype == "fp32" and backend in ("varlen", "flash", "fused"):
        raise InputError(
            f"--attention-backend {backend}, the run's own where the option is not given, computes in 16 bits; give "
            "--dtype bf16, or --attention-backend local"
        )
    return open_model(None if hf is None else Path(hf), checkpoint, dtype, {**chosen, **data})

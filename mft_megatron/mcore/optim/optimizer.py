"""Megatron-Core's Adam or SGD over this rank's parameters, and its schedules of learning rate and weight decay.

Schedules count optimizer steps: one increment per step, whatever the batch or world size.

Parameter groups are the same on every rank: parameters with weight decay, biases and norms, which have none, and with
``--decoupled-lr`` the word embedding and the output layer.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import USING_TE_OPTIMIZER
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from mft_megatron.arguments.table import Arguments
from mft_megatron.errors import InputError
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.gradient_norm import compute_at_once
from mft_megatron.mcore.platform.megatron_fixes import (
    precise_states_without_transformer_engine,
    torch_adam_for_offloading,
)
from mft_megatron.mcore.platform.precisions import DTYPES

from .slices import ADAM

STATE_DTYPES = {**DTYPES, "fp8": torch.uint8}


def build_optimizer(arguments: Arguments, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Build the optimizer over all chunks of this rank.

    With ``--bf16`` and ``--fp16`` it has fp32 main weights, which the distributed optimizer shards over data-parallel
    ranks.

    Raises:
        InputError: the optimizer needs a CUDA device or a package that this machine lacks.
    """
    compute_at_once()
    regularization = arguments.regularization
    precise_states_without_transformer_engine()
    config = OptimizerConfig(
        optimizer=arguments.training.optimizer,
        lr=arguments.learning_rate.lr,
        min_lr=arguments.learning_rate.min_lr,
        decoupled_lr=arguments.learning_rate.decoupled_lr,
        decoupled_min_lr=arguments.learning_rate.decoupled_min_lr,
        weight_decay=regularization.weight_decay,
        apply_wd_to_qk_layernorm=regularization.apply_wd_to_qk_layernorm,
        adam_beta1=regularization.adam_beta1,
        adam_beta2=regularization.adam_beta2,
        adam_eps=regularization.adam_eps,
        clip_grad=regularization.clip_grad,
        params_dtype=chunks[0].config.params_dtype,
        use_distributed_optimizer=arguments.distributed.use_distributed_optimizer,
        overlap_param_gather=arguments.distributed.overlap_param_gather,
        sgd_momentum=regularization.sgd_momentum,
        log_num_zeros_in_grad=arguments.logging.log_num_zeros_in_grad,
        **_precision(arguments),
        **_offload(arguments),
    )
    overrides = get_standard_config_overrides(config)
    for override in overrides.values():
        if "max_lr" in override:
            # Megatron-Core tells a checkpoint's groups apart by this, and sets it only for its two usual groups
            override["is_decoupled_lr"] = True
    ratio = arguments.lora.loraplus_lr_ratio
    if ratio is not None:
        # LoRA+ (Hayou et al. 2024, arXiv 2402.12354)
        overrides[ParamKey(name="*.lora_b")] = {"max_lr": ratio * config.lr, "min_lr": ratio * config.min_lr}
    with torch_adam_for_offloading() if config.use_torch_optimizer_for_cpu_offload else contextlib.nullcontext():
        optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides, use_gloo_process_groups=False)
    if devices.HAS_CUDA:
        for part in optimizer.chained_optimizers:
            fuse_updates(part.optimizer)
    return optimizer


def fuse_updates(inner: Any) -> None:
    """Let torch's Adam update all weights in place by one kernel; other optimizers stay as they are.

    Its default on a GPU computes with a temporary tensor of the size of all weights that the rank updates.

    Args:
        inner: an optimizer that has not stepped, or ``None``.
    """
    if isinstance(inner, ADAM):
        for group in inner.param_groups:
            group["fused"] = True


def _precision(arguments: Arguments) -> dict[str, Any]:
    """Dtypes of the optimizer's states, and the loss scale.

    Raises:
        InputError: no optimizer on this machine can keep states in smaller dtypes.
    """
    p = arguments.precision
    if p.use_precision_aware_optimizer and not (arguments.training.optimizer_cpu_offload or USING_TE_OPTIMIZER):
        raise InputError(
            "--use-precision-aware-optimizer needs the fused Adam of Transformer Engine, which is not installed here; "
            "install it, or leave the option out"
        )
    return {
        "bf16": p.bf16,
        "fp16": p.fp16,
        "loss_scale": p.loss_scale,
        "initial_loss_scale": p.initial_loss_scale,
        "min_loss_scale": p.min_loss_scale,
        "loss_scale_window": int(p.loss_scale_window),
        "hysteresis": p.hysteresis,
        "use_precision_aware_optimizer": p.use_precision_aware_optimizer,
        "main_grads_dtype": STATE_DTYPES[p.main_grads_dtype],
        "main_params_dtype": STATE_DTYPES[p.main_params_dtype],
        "exp_avg_dtype": STATE_DTYPES[p.exp_avg_dtype],
        "exp_avg_sq_dtype": STATE_DTYPES[p.exp_avg_sq_dtype],
    }


def _offload(arguments: Arguments) -> dict[str, Any]:
    """Options for states in the host's memory.

    Raises:
        InputError: there is no CUDA device, so all states are in the host's memory.
    """
    training = arguments.training
    if training.optimizer_cpu_offload and not devices.HAS_CUDA:
        raise InputError(
            "--optimizer-cpu-offload: no CUDA device here, all states are in the host's memory; leave it out"
        )
    return {
        "optimizer_cpu_offload": training.optimizer_cpu_offload,
        "optimizer_offload_fraction": training.optimizer_offload_fraction,
        "use_torch_optimizer_for_cpu_offload": training.use_torch_optimizer_for_cpu_offload,
        "overlap_cpu_optimizer_d2h_h2d": training.overlap_cpu_optimizer_d2h_h2d,
    }


def build_scheduler(arguments: Arguments, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build the schedule of learning rate and weight decay, in optimizer steps."""
    schedule, regularization = arguments.learning_rate, arguments.regularization
    start_decay, end_decay = regularization.start_weight_decay, regularization.end_weight_decay
    if regularization.weight_decay_incr_style == "constant":
        start_decay = end_decay = regularization.weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=schedule.lr,
        min_lr=schedule.min_lr,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=schedule.lr_decay_iters,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=start_decay,
        end_wd=end_decay,
        wd_incr_steps=arguments.training.train_iters,
        wd_incr_style=regularization.weight_decay_incr_style,
        wsd_decay_steps=schedule.lr_wsd_decay_iters,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
        # the command line decides; a checkpoint gives only the position in the schedule
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """Learning rate of the next step, for parameters with the default schedule."""
    return next(group["lr"] for group in optimizer.param_groups if group["default_config"])


def loss_scale(optimizer: MegatronOptimizer) -> Tensor | None:
    """Factor by which the next step scales its loss, fp32 [1] on the device; ``None`` without loss scaling."""
    scaled = any(getattr(part, "grad_scaler", None) for part in optimizer.chained_optimizers)
    return optimizer.get_loss_scale() if scaled else None

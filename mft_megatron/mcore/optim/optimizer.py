"""Adam or SGD over this rank's parameters and the schedules of its rates and weight decay, all Megatron-Core's.

Schedules count optimizer steps: one increment a step, whatever the batch or world size.

Parameters are in the same groups on every rank: those with weight decay, biases and norms, which have none, and with
``--decoupled-lr`` the word embedding and the output layer.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

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

from mft_megatron.arguments.table import Arguments
from mft_megatron.errors import InputError
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.precisions import DTYPES

STATE_DTYPES = {**DTYPES, "fp8": torch.uint8}


def build_optimizer(arguments: Arguments, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """The optimizer over all chunks of this rank; with fp32 main weights under ``--bf16`` and ``--fp16``, which the
    distributed optimizer divides among data-parallel ranks.

    Raises:
        InputError: the optimizer needs what this machine lacks.
    """
    regularization = arguments.regularization
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
            # by this Megatron-Core tells groups of a checkpoint apart, and leaves it to who has more than the usual two
            override["is_decoupled_lr"] = True
    ratio = arguments.lora.loraplus_lr_ratio
    if ratio is not None:
        # LoRA+ (Hayou et al. 2024, arXiv 2402.12354)
        overrides[ParamKey(name="*.lora_b")] = {"max_lr": ratio * config.lr, "min_lr": ratio * config.min_lr}
    return get_megatron_optimizer(config, chunks, config_overrides=overrides, use_gloo_process_groups=False)


def _precision(arguments: Arguments) -> dict[str, Any]:
    """Dtypes of the optimizer's states, and the loss scale.

    Raises:
        InputError: states in smaller dtypes where no optimizer can keep them.
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
    """Which states are in the host's memory.

    Raises:
        InputError: there is no other memory.
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
    """Warm-up and decay of the learning rate and growth of the weight decay, in optimizer steps."""
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
        # what the command line says holds; a checkpoint only says how far the schedule has come
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of the next step, for parameters with the default schedule."""
    return next(group["lr"] for group in optimizer.param_groups if group["default_config"])


def loss_scale(optimizer: MegatronOptimizer) -> float | None:
    """What the next step multiplies its loss by; ``None`` where that is nothing. Waits for the device."""
    scaled = any(getattr(part, "grad_scaler", None) for part in optimizer.chained_optimizers)
    return optimizer.get_loss_scale().item() if scaled else None

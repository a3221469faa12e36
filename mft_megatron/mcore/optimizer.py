"""Adam over this rank's parameters and the schedules of its rates and weight decay, all Megatron-Core's.

Schedules count optimizer steps: one increment a step, whatever the batch or world size.

Parameters are in the same groups on every rank: those with weight decay, biases and norms, which have none, and with
``--decoupled-lr`` the word embedding and the output layer.
"""

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mft_megatron.arguments import Arguments


def build_optimizer(arguments: Arguments, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Adam with decoupled weight decay over all chunks of this rank; fp32 main weights under ``--bf16``."""
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
        bf16=arguments.precision.bf16,
        params_dtype=chunks[0].config.params_dtype,
    )
    overrides = get_standard_config_overrides(config)
    for override in overrides.values():
        if "max_lr" in override:
            # by this Megatron-Core tells groups of a checkpoint apart, and leaves it to who has more than the usual two
            override["is_decoupled_lr"] = True
    return get_megatron_optimizer(config, chunks, config_overrides=overrides, use_gloo_process_groups=False)


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


def restore_optimizer(optimizer: MegatronOptimizer, state: dict) -> None:
    """Load an optimizer state, in place; rates and other settings stay those of the command line.

    Megatron-Core takes the settings of each parameter group from the checkpoint.
    """
    settings = [_settings(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _settings(group: dict) -> dict:
    return {name: value for name, value in group.items() if name not in ("params", "step")}

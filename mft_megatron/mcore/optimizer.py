"""Adam over this rank's parameters and the learning-rate schedule, both Megatron-Core's.

Schedules count optimizer steps: one increment a step, whatever the batch or world size.
"""

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mft_megatron.arguments import Arguments


def build_optimizer(arguments: Arguments, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Adam with decoupled weight decay over all chunks of this rank; fp32 main weights under ``--bf16``."""
    regularization = arguments.regularization
    config = OptimizerConfig(
        optimizer=arguments.training.optimizer,
        lr=arguments.learning_rate.lr,
        min_lr=arguments.learning_rate.min_lr,
        weight_decay=regularization.weight_decay,
        adam_beta1=regularization.adam_beta1,
        adam_beta2=regularization.adam_beta2,
        adam_eps=regularization.adam_eps,
        clip_grad=regularization.clip_grad,
        bf16=arguments.precision.bf16,
        params_dtype=chunks[0].config.params_dtype,
    )
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)


def build_scheduler(arguments: Arguments, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up and decay of the learning rate, in optimizer steps."""
    schedule = arguments.learning_rate
    warmup = schedule.lr_warmup_iters
    if schedule.lr_warmup_fraction is not None:
        warmup = int(schedule.lr_warmup_fraction * schedule.lr_decay_iters)
    decay = arguments.regularization.weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=schedule.lr,
        min_lr=schedule.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=schedule.lr_decay_iters,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=arguments.training.train_iters,
        wd_incr_style="constant",
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

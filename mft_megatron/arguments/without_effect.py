"""Options that have no effect because what they set is not in use: a loss, a balancer, a schedule, an optimizer …

Such an option is refused instead of being ignored. For a new one add a line to :func:`_owners`: the name of the field,
or the beginning of names, ending with ``_``; whether it is in use; and what it needs, in words that follow "has no
effect without".
"""

import dataclasses
from collections.abc import Set

from mft_megatron.loss_names import FOCAL
from mft_megatron.options import spelling

from .table import GROUPS, Arguments

_FP8_DELAYED = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad")
_FP8 = ("fp8_recipe", "first_last_layers_bf16", *_FP8_DELAYED)
_ADAPTERS = ("lora_", "use_rslora", "loraplus_lr_ratio", "save_adapters_only")


def option_without_effect(a: Arguments, asked_for: Set[str]) -> str | None:
    """The line that refuses the first option without effect, or ``None``.

    Args:
        a: the options, which need not be complete.
        asked_for: the fields that the user set; the others are not refused.
    """
    owners = _owners(a)
    for field in (field for _, group in GROUPS for field in dataclasses.fields(group)):
        for name, in_use, wanted in owners:
            owned = field.name.startswith(name) if name.endswith("_") else field.name == name
            if owned and field.name in asked_for and not in_use:
                return f"{spelling(field)} has no effect without {wanted}; add that, or leave it out"
    return None


def _owners(a: Arguments) -> list[tuple[str, object, str]]:
    """Names of fields, whether they are in use (by truth), and what they need."""
    task, train, validation, precision = a.multi_task, a.training, a.validation, a.precision
    distributed, checkpoint, engine, network = a.distributed, a.checkpoint, a.transformer_engine, a.network
    decay, growth = a.learning_rate.lr_decay_style, a.regularization.weight_decay_incr_style
    best = validation.early_stopping_patience or checkpoint.save_best
    selective = a.recompute.recompute_activations or a.recompute.recompute_granularity == "selective"
    precise, offload = precision.use_precision_aware_optimizer, train.optimizer_cpu_offload
    buckets, sharded = distributed.overlap_grad_reduce, distributed.use_distributed_optimizer
    adapters = a.lora.peft_type != "none"
    rope = network.position_embedding_type == "rope"
    board = checkpoint.save or a.logging.tensorboard_dir or a.logging.wandb_project
    return [
        ("focal_", task.mft_loss in FOCAL, "--mft-loss focal-sample or focal-task"),
        ("self_paced_", task.task_balance == "self-paced", "--task-balance self-paced"),
        ("famo_", task.task_balance == "famo", "--task-balance famo"),
        ("coba_", task.task_balance == "coba", "--task-balance coba"),
        ("early_stopping_metric", best, "--early-stopping-patience or --save-best"),
        (
            "early_stopping_min_delta",
            best or validation.task_early_stopping_patience is not None,
            "--early-stopping-patience, --task-early-stopping-patience or --save-best",
        ),
        ("loss_spike_window", a.bad_steps.loss_spike_factor, "--loss-spike-factor"),
        ("max_bad_steps", a.bad_steps.on_bad_step != "stop", "--on-bad-step skip or rollback"),
        ("window_attn_skip_freq", network.window_size, "--window-size"),
        ("rotary_interleaved", rope, "--position-embedding-type rope"),
        ("rotary_seq_len_interpolation_factor", rope, "--position-embedding-type rope"),
        (
            "init_method_std",
            not a.initialization.init_method_xavier_uniform,
            "a normal distribution, and --init-method-xavier-uniform is a different one",
        ),
        ("save_hf", not validation.skip_train, "training, which --skip-train leaves out"),
        ("ckpt_step", checkpoint.load, "--load"),
        (
            "verify_checkpoint",
            checkpoint.load or checkpoint.pretrained_checkpoint or checkpoint.auto_resume,
            "a checkpoint of --load, --auto-resume or --pretrained-checkpoint",
        ),
        ("exit_on_missing_checkpoint", checkpoint.load, "--load"),
        ("save_retain_interval", checkpoint.save_interval, "--save-interval"),
        ("keep_last", checkpoint.save, "--save"),
        ("async_save", checkpoint.save, "--save"),
        ("exit_signal", train.exit_signal_handler, "--exit-signal-handler"),
        ("manual_gc_", train.manual_gc, "--manual-gc"),
        ("tensorboard_", board, "--save or --tensorboard-dir"),
        ("log_validation_ppl_to_tensorboard", board, "--save or --tensorboard-dir"),
        ("log_world_size_to_tensorboard", board, "--save or --tensorboard-dir"),
        ("log_memory_to_tensorboard", board, "--save or --tensorboard-dir"),
        ("wandb_exp_name", a.logging.wandb_project, "--wandb-project"),
        ("wandb_entity", a.logging.wandb_project, "--wandb-project"),
        ("wandb_save_dir", a.logging.wandb_project, "--wandb-project"),
        ("add_attention_bias", not network.add_bias_linear, "--disable-bias-linear"),
        ("add_mlp_bias", not network.add_bias_linear, "--disable-bias-linear"),
        ("num_query_groups", network.group_query_attention, "--group-query-attention"),
        ("lr_wsd_", decay == "WSD", "--lr-decay-style WSD"),
        ("min_lr", decay != "constant", "a decay, and --lr-decay-style constant has none"),
        ("decoupled_min_lr", decay != "constant", "a decay, and --lr-decay-style constant has none"),
        ("decoupled_min_lr", a.learning_rate.decoupled_lr is not None, "--decoupled-lr"),
        ("sgd_", train.optimizer == "sgd", "--optimizer sgd"),
        ("adam_", train.optimizer == "adam", "--optimizer adam, which is the default"),
        ("initial_loss_scale", precision.dynamic_loss_scale, "the dynamic loss scale of --fp16"),
        ("min_loss_scale", precision.dynamic_loss_scale, "the dynamic loss scale of --fp16"),
        ("loss_scale_window", precision.dynamic_loss_scale, "the dynamic loss scale of --fp16"),
        ("hysteresis", precision.dynamic_loss_scale, "the dynamic loss scale of --fp16"),
        ("loss_scale", precision.fp16 or precision.bf16, "--fp16 or --bf16"),
        ("grad_reduce_in_bf16", precision.bf16, "--bf16"),
        ("fp32_residual_connection", precision.fp16 or precision.bf16, "--fp16 or --bf16"),
        ("main_grads_dtype", precise, "--use-precision-aware-optimizer"),
        ("main_params_dtype", precise, "--use-precision-aware-optimizer"),
        ("exp_avg_dtype", precise, "--use-precision-aware-optimizer"),
        ("exp_avg_sq_dtype", precise, "--use-precision-aware-optimizer"),
        ("ddp_bucket_size", buckets, "--overlap-grad-reduce"),
        ("ddp_num_buckets", buckets, "--overlap-grad-reduce"),
        ("align_grad_reduce", buckets, "--overlap-grad-reduce"),
        ("align_param_gather", distributed.overlap_param_gather, "--overlap-param-gather"),
        ("ddp_pad_buckets_for_high_nccl_busbw", sharded, "--use-distributed-optimizer"),
        ("num_distributed_optimizer_instances", sharded, "--use-distributed-optimizer"),
        ("optimizer_offload_fraction", offload, "--optimizer-cpu-offload"),
        ("use_torch_optimizer_for_cpu_offload", offload, "--optimizer-cpu-offload"),
        ("overlap_cpu_optimizer_d2h_h2d", offload, "--optimizer-cpu-offload"),
        *((name, engine.fp8_format, "--fp8-format") for name in _FP8),
        ("num_layers_at_start_in_bf16", engine.first_last_layers_bf16, "--first-last-layers-bf16"),
        ("num_layers_at_end_in_bf16", engine.first_last_layers_bf16, "--first-last-layers-bf16"),
        *((name, engine.fp8_recipe == "delayed", "--fp8-recipe delayed") for name in _FP8_DELAYED),
        ("bias_swiglu_fusion", network.swiglu, "--swiglu"),
        ("moe_", network.num_experts, "--num-experts"),
        *((name, adapters, "--peft-type lora or qlora") for name in _ADAPTERS),
        ("moe_router_bias_update_rate", not adapters, "training of the routers, which adapters do not change"),
        (
            "moe_router_bias_update_rate",
            network.moe_router_enable_expert_bias,
            "--moe-router-enable-expert-bias",
        ),
        ("moe_token_drop_policy", a.moe.moe_expert_capacity_factor, "--moe-expert-capacity-factor"),
        ("weight_decay", growth == "constant", "--weight-decay-incr-style constant, which is the default"),
        ("recompute_modules", selective, "--recompute-granularity selective"),
        ("start_weight_decay", growth != "constant", "--weight-decay-incr-style linear or cosine"),
        ("end_weight_decay", growth != "constant", "--weight-decay-incr-style linear or cosine"),
    ]

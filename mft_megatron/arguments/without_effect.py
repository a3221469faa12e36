"""Options of what is not in use: a loss, a balancer, a schedule, a criterion, an optimizer …

Such an option is refused instead of being passed over. To tell of another one add a line to ``owners``: the name of the
field (or how names begin, with ``_`` at the end), whether it is in use, and what it needs, in words that follow
"has no effect without".
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from mft_megatron.loss_names import FOCAL
from mft_megatron.options import spelling

from .table import GROUPS

FP8_DELAYED = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad")
ADAPTERS = ("lora_", "use_rslora", "loraplus_lr_ratio", "save_adapters_only")
FP8 = ("fp8_recipe", "first_last_layers_bf16", *FP8_DELAYED)


def option_without_effect(given: Mapping[str, Any], asked_for: Collection[str]) -> str | None:
    """The first option that has no effect, in the line that refuses it.

    Args:
        given: the values that were given, by field; nothing for those that were not.
        asked_for: the fields that somebody asked for; those that a file of effective values mentions are not.
    """
    loss, balance = given.get("mft_loss", "task-token"), given.get("task_balance", "static")
    decay, growth = given.get("lr_decay_style", "linear"), given.get("weight_decay_incr_style", "constant")
    best = given.get("early_stopping_patience") or given.get("save_best")
    selective = given.get("recompute_activations") or given.get("recompute_granularity") == "selective"
    dynamic = given.get("fp16") and given.get("loss_scale") is None
    precise, offload = given.get("use_precision_aware_optimizer"), given.get("optimizer_cpu_offload")
    buckets, sharded = given.get("overlap_grad_reduce"), given.get("use_distributed_optimizer")
    adapters = given.get("peft_type", "none") != "none"
    rope = given.get("position_embedding_type") == "rope"
    board = given.get("save") or given.get("tensorboard_dir") or given.get("wandb_project")
    owners = (
        ("focal_", loss in FOCAL, "--mft-loss focal-sample or focal-task"),
        ("self_paced_", balance == "self-paced", "--task-balance self-paced"),
        ("famo_", balance == "famo", "--task-balance famo"),
        ("coba_", balance == "coba", "--task-balance coba"),
        ("early_stopping_metric", best, "--early-stopping-patience or --save-best"),
        (
            "early_stopping_min_delta",
            best or "task_early_stopping_patience" in given,
            "--early-stopping-patience, --task-early-stopping-patience or --save-best",
        ),
        ("window_attn_skip_freq", given.get("window_size"), "--window-size"),
        ("rotary_interleaved", rope, "--position-embedding-type rope"),
        ("rotary_seq_len_interpolation_factor", rope, "--position-embedding-type rope"),
        (
            "init_method_std",
            not given.get("init_method_xavier_uniform"),
            "a normal distribution, and --init-method-xavier-uniform is another",
        ),
        ("save_hf", not given.get("skip_train"), "training, which --skip-train leaves out"),
        ("ckpt_step", given.get("load"), "--load"),
        ("exit_on_missing_checkpoint", given.get("load"), "--load"),
        ("save_retain_interval", given.get("save_interval"), "--save-interval"),
        ("exit_signal", given.get("exit_signal_handler"), "--exit-signal-handler"),
        ("manual_gc_", given.get("manual_gc"), "--manual-gc"),
        ("tensorboard_", board, "--save or --tensorboard-dir"),
        ("log_validation_ppl_to_tensorboard", board, "--save or --tensorboard-dir"),
        ("log_world_size_to_tensorboard", board, "--save or --tensorboard-dir"),
        ("log_memory_to_tensorboard", board, "--save or --tensorboard-dir"),
        ("wandb_exp_name", given.get("wandb_project"), "--wandb-project"),
        ("wandb_entity", given.get("wandb_project"), "--wandb-project"),
        ("wandb_save_dir", given.get("wandb_project"), "--wandb-project"),
        ("num_query_groups", given.get("group_query_attention"), "--group-query-attention"),
        ("lr_wsd_", decay == "WSD", "--lr-decay-style WSD"),
        ("min_lr", decay != "constant", "a decay, and --lr-decay-style constant has none"),
        ("decoupled_min_lr", decay != "constant", "a decay, and --lr-decay-style constant has none"),
        ("decoupled_min_lr", "decoupled_lr" in given, "--decoupled-lr"),
        ("sgd_", given.get("optimizer") == "sgd", "--optimizer sgd"),
        ("adam_", given.get("optimizer", "adam") == "adam", "--optimizer adam, which is the default"),
        ("initial_loss_scale", dynamic, "the dynamic loss scale of --fp16"),
        ("min_loss_scale", dynamic, "the dynamic loss scale of --fp16"),
        ("loss_scale_window", dynamic, "the dynamic loss scale of --fp16"),
        ("hysteresis", dynamic, "the dynamic loss scale of --fp16"),
        ("loss_scale", given.get("fp16") or given.get("bf16"), "--fp16 or --bf16"),
        ("grad_reduce_in_bf16", given.get("bf16"), "--bf16"),
        ("main_grads_dtype", precise, "--use-precision-aware-optimizer"),
        ("main_params_dtype", precise, "--use-precision-aware-optimizer"),
        ("exp_avg_dtype", precise, "--use-precision-aware-optimizer"),
        ("exp_avg_sq_dtype", precise, "--use-precision-aware-optimizer"),
        ("ddp_bucket_size", buckets, "--overlap-grad-reduce"),
        ("ddp_num_buckets", buckets, "--overlap-grad-reduce"),
        ("align_grad_reduce", buckets, "--overlap-grad-reduce"),
        ("align_param_gather", given.get("overlap_param_gather"), "--overlap-param-gather"),
        ("ddp_pad_buckets_for_high_nccl_busbw", sharded, "--use-distributed-optimizer"),
        ("num_distributed_optimizer_instances", sharded, "--use-distributed-optimizer"),
        ("optimizer_offload_fraction", offload, "--optimizer-cpu-offload"),
        ("use_torch_optimizer_for_cpu_offload", offload, "--optimizer-cpu-offload"),
        ("overlap_cpu_optimizer_d2h_h2d", offload, "--optimizer-cpu-offload"),
        *((name, given.get("fp8_format"), "--fp8-format") for name in FP8),
        ("num_layers_at_start_in_bf16", given.get("first_last_layers_bf16"), "--first-last-layers-bf16"),
        ("num_layers_at_end_in_bf16", given.get("first_last_layers_bf16"), "--first-last-layers-bf16"),
        *((name, given.get("fp8_recipe", "delayed") == "delayed", "--fp8-recipe delayed") for name in FP8_DELAYED),
        ("bias_swiglu_fusion", given.get("swiglu"), "--swiglu"),
        ("async_save", given.get("save"), "--save"),
        ("moe_", given.get("num_experts"), "--num-experts"),
        *((name, adapters, "--peft-type lora or qlora") for name in ADAPTERS),
        ("moe_router_bias_update_rate", not adapters, "training of the routers, which adapters leave as they are"),
        ("moe_router_bias_update_rate", given.get("moe_router_enable_expert_bias"), "--moe-router-enable-expert-bias"),
        ("moe_token_drop_policy", given.get("moe_expert_capacity_factor"), "--moe-expert-capacity-factor"),
        ("weight_decay", growth == "constant", "--weight-decay-incr-style constant, which is the default"),
        ("recompute_modules", selective, "--recompute-granularity selective"),
        ("start_weight_decay", growth != "constant", "--weight-decay-incr-style linear or cosine"),
        ("end_weight_decay", growth != "constant", "--weight-decay-incr-style linear or cosine"),
    )
    for field in (field for _, group in GROUPS for field in dataclasses.fields(group)):
        for name, in_use, wanted in owners:
            owned = field.name.startswith(name) if name.endswith("_") else field.name == name
            if owned and field.name in asked_for and not in_use:
                return f"{spelling(field)} has no effect without {wanted}; add that, or leave it out"
    return None

"""Check the schedules of learning rate and weight decay."""

from mft_megatron.arguments.table import Arguments


def check_schedule(a: Arguments) -> str | None:
    """Check warm-up, decay and the lowest learning rates."""
    schedule = a.learning_rate
    if schedule.lr_warmup_fraction is not None and schedule.lr_warmup_iters:
        return "--lr-warmup-fraction and --lr-warmup-iters both set the warm-up; give one of them"
    if schedule.lr_warmup_iters and schedule.lr_warmup_iters >= schedule.lr_decay_iters:
        return (
            f"--lr-warmup-iters {schedule.lr_warmup_iters} leaves nothing of the {schedule.lr_decay_iters} decay "
            "steps; shorten the warm-up or raise --lr-decay-iters"
        )
    if schedule.lr_decay_style == "WSD":
        last = schedule.lr_wsd_decay_iters
        if last is None:
            return "--lr-decay-style WSD needs --lr-wsd-decay-iters N: how many of its last steps decay"
        if last > schedule.lr_decay_iters - schedule.warmup_steps:
            return (
                f"--lr-wsd-decay-iters {last} and a warm-up of {schedule.warmup_steps:g} steps are more than the "
                f"{schedule.lr_decay_iters} decay steps; shorten one or raise --lr-decay-iters"
            )
    lowest = schedule.min_lr if schedule.decoupled_min_lr is None else schedule.decoupled_min_lr
    for name, rate, name_of_lowest, low in (
        ("--lr", schedule.lr, "--min-lr", schedule.min_lr),
        ("--decoupled-lr", schedule.decoupled_lr, "--decoupled-min-lr (not given: --min-lr)", lowest),
    ):
        if rate is not None and low > rate:
            return f"{name_of_lowest} {low} is above {name} {rate}; lower it"
        if rate is not None and schedule.lr_warmup_init > rate:
            return f"--lr-warmup-init {schedule.lr_warmup_init} is above {name} {rate}; lower it"
    if schedule.lr_warmup_init and not schedule.warmup_steps:
        return (
            f"--lr-warmup-init {schedule.lr_warmup_init} has no effect without a warm-up; give --lr-warmup-iters or "
            "--lr-warmup-fraction, or leave it out"
        )
    return None


def check_weight_decay(a: Arguments) -> str | None:
    """Check the growth of weight decay."""
    r = a.regularization
    if r.apply_wd_to_qk_layernorm and not a.network.qk_layernorm:
        return "--apply-wd-to-qk-layernorm without --qk-layernorm has nothing to apply to; leave it out"
    style = r.weight_decay_incr_style
    if style == "constant":
        return None
    if r.start_weight_decay is None or r.end_weight_decay is None:
        return f"--weight-decay-incr-style {style} needs both --start-weight-decay and --end-weight-decay; give them"
    if r.start_weight_decay > r.end_weight_decay:
        return (
            f"--start-weight-decay {r.start_weight_decay} is above --end-weight-decay {r.end_weight_decay}; weight "
            "decay can only grow, exchange them"
        )
    return None

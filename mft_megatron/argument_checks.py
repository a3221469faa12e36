"""Everything that can be refused without a device: each check is given the whole of the arguments.

A check returns ``None``, or the one line that refuses the run: what, with the numbers, and the remedy.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .batch_sizes import step_schedule
from .errors import InputError
from .loss_names import FOCAL, WEIGHTED
from .options import out_of_range
from .run_folder import is_checkpoint

if TYPE_CHECKING:
    from .arguments import Arguments


def check_ranges(a: Arguments) -> str | None:
    groups = (value for value in vars(a).values() if dataclasses.is_dataclass(value))
    return next(filter(None, map(out_of_range, groups)), None)


def check_heads(a: Arguments) -> str | None:
    n, tp = a.network, a.distributed.tensor_model_parallel_size
    if n.num_attention_heads * n.kv_channels != n.hidden_size and n.hidden_size % n.num_attention_heads:
        return (
            f"--hidden-size {n.hidden_size} is not divisible by --num-attention-heads {n.num_attention_heads}; change "
            "one of them or give --kv-channels"
        )
    if n.kv_channels % 2 and n.position_embedding_type == "rope":
        return f"--kv-channels {n.kv_channels}: rope needs an even head size"
    if n.num_attention_heads % n.num_query_groups:
        return f"--num-query-groups {n.num_query_groups} does not divide --num-attention-heads {n.num_attention_heads}"
    if n.num_attention_heads % tp:
        return (
            f"--tensor-model-parallel-size {tp} does not divide --num-attention-heads {n.num_attention_heads}; use a "
            "divisor of the number of heads"
        )
    if n.num_query_groups % tp:
        return (
            f"--tensor-model-parallel-size {tp} does not divide --num-query-groups {n.num_query_groups}; use a divisor "
            "of the number of groups"
        )
    if n.ffn_hidden_size % tp:
        return f"--tensor-model-parallel-size {tp} does not divide --ffn-hidden-size {n.ffn_hidden_size}"
    return None


def check_positions(a: Arguments) -> str | None:
    if a.data.seq_length > a.network.max_position_embeddings:
        return (
            f"--seq-length {a.data.seq_length} is longer than --max-position-embeddings "
            f"{a.network.max_position_embeddings}; raise the latter or pack the data for a shorter length"
        )
    return None


def check_layout(a: Arguments) -> str | None:
    tp, pp = a.distributed.tensor_model_parallel_size, a.distributed.pipeline_model_parallel_size
    if a.world_size % (tp * pp):
        return (
            f"{a.world_size} ranks cannot be divided into --tensor-model-parallel-size {tp} × "
            f"--pipeline-model-parallel-size {pp} = {tp * pp}; start a multiple of {tp * pp} with torchrun"
        )
    if a.network.num_layers % pp:
        return f"--pipeline-model-parallel-size {pp} does not divide --num-layers {a.network.num_layers}"
    if a.distributed.sequence_parallel and tp == 1:
        return "--sequence-parallel needs --tensor-model-parallel-size of at least 2; leave it out"
    if a.distributed.sequence_parallel and a.data.seq_length % tp:
        return (
            f"--sequence-parallel: --tensor-model-parallel-size {tp} does not divide --seq-length {a.data.seq_length}"
        )
    return None


def check_virtual_stages(a: Arguments) -> str | None:
    pp = a.distributed.pipeline_model_parallel_size
    given = {
        "--num-layers-per-virtual-pipeline-stage": a.distributed.num_layers_per_virtual_pipeline_stage,
        "--num-virtual-stages-per-pipeline-rank": a.distributed.num_virtual_stages_per_pipeline_rank,
    }
    given = {name: number for name, number in given.items() if number is not None}
    if len(given) == 2:
        return f"{' and '.join(given)} both set the number of virtual stages; give one of them"
    for name, number in given.items():
        if pp == 1:
            return f"{name} {number} needs --pipeline-model-parallel-size of at least 2; leave it out"
        if a.network.num_layers % (pp * number):
            return (
                f"{name} {number} × --pipeline-model-parallel-size {pp} = {pp * number} does not divide --num-layers "
                f"{a.network.num_layers}; change one of them"
            )
    return None


def check_batch_schedule(a: Arguments) -> str | None:
    t = a.training
    if t.rampup_batch_size is not None and t.step_batch_size_schedule is not None:
        return "--rampup-batch-size and --step-batch-size-schedule both set the batch sizes; give one of them"
    if t.step_batch_size_schedule is not None:
        try:
            last = step_schedule(t.step_batch_size_schedule, a.data.seq_length).sizes[-1]
        except InputError as error:
            return str(error)
        if t.global_batch_size not in (None, last):
            return (
                f"--global-batch-size {t.global_batch_size}: with --step-batch-size-schedule it is the last size "
                f"there, {last}; leave it out"
            )
    if t.rampup_batch_size is None:
        return None
    start, increment, samples = t.rampup_batch_size
    ramp = f"--rampup-batch-size {start} {increment} {samples}"
    if min(t.rampup_batch_size) < 1:
        return f"{ramp}: START, INCREMENT and SAMPLES must be at least 1"
    if t.global_batch_size is None:
        return f"{ramp} grows to --global-batch-size; give that, too"
    if start >= t.global_batch_size:
        return f"{ramp} does not start below --global-batch-size {t.global_batch_size}; lower START, or leave it out"
    if (t.global_batch_size - start) % increment:
        return (
            f"{ramp} does not end at --global-batch-size {t.global_batch_size}: INCREMENT {increment} does not divide "
            f"the difference of {t.global_batch_size - start}; change one of them"
        )
    return None


def check_batches(a: Arguments) -> str | None:
    consumed = 0 if a.resume is None or a.checkpoint.finetune else a.resume[1].consumed_samples
    # sizes that a run has behind it may have been of another layout
    sizes = a.batch_sizes.from_then_on(consumed)
    wrong = next((size for size in sizes if size % a.batch_multiple), None)
    if wrong is None:
        return None
    factors = f"--micro-batch-size {a.training.micro_batch_size} × data-parallel size {a.data_parallel_size}"
    if a.distributed.interleaved:
        factors += f" × --pipeline-model-parallel-size {a.distributed.pipeline_model_parallel_size} (interleaved)"
    not_multiple = f"is not a multiple of {factors} = {a.batch_multiple}"
    if a.training.step_batch_size_schedule is not None:
        return f"--step-batch-size-schedule: the size {wrong} {not_multiple}; change it"
    if a.training.rampup_batch_size is not None:
        ramp = " ".join(map(str, a.training.rampup_batch_size))
        return (
            f"--rampup-batch-size {ramp}: on the way to --global-batch-size {a.training.global_batch_size} the size "
            f"{wrong} {not_multiple}; choose START, INCREMENT and --global-batch-size as multiples of it"
        )
    return f"--global-batch-size {wrong} {not_multiple}"


def check_schedule(a: Arguments) -> str | None:
    schedule = a.learning_rate
    if schedule.lr_warmup_fraction is not None and schedule.lr_warmup_iters:
        return "--lr-warmup-fraction and --lr-warmup-iters both set the warm-up; give one of them"
    if schedule.lr_warmup_iters and schedule.lr_warmup_iters >= schedule.lr_decay_iters:
        return (
            f"--lr-warmup-iters {schedule.lr_warmup_iters} leaves nothing of the {schedule.lr_decay_iters} decay "
            "steps; shorten the warm-up or raise --lr-decay-iters"
        )
    if schedule.lr_decay_style == "WSD" and schedule.lr_wsd_decay_iters is None:
        return "--lr-decay-style WSD needs --lr-wsd-decay-iters N: how many of its last steps decay"
    if (
        schedule.lr_decay_style == "WSD"
        and schedule.lr_wsd_decay_iters > schedule.lr_decay_iters - schedule.warmup_steps
    ):
        return (
            f"--lr-wsd-decay-iters {schedule.lr_wsd_decay_iters} and a warm-up of {schedule.warmup_steps:g} steps are "
            f"more than the {schedule.lr_decay_iters} decay steps; shorten one or raise --lr-decay-iters"
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


def check_checkpointing(a: Arguments) -> str | None:
    c = a.checkpoint
    if c.save is None and c.save_interval is not None:
        return "--save-interval without --save: give --save DIR"
    if c.save is None and a.training.exit_interval is not None:
        return "--exit-interval without --save would lose the run: give --save DIR"
    if c.save is not None and c.load is None and is_checkpoint(c.save):
        return (
            f"--save {c.save} holds the checkpoints of another run: add --load {c.save} to go on with it, or name "
            "another folder"
        )
    if c.finetune and c.load is None:
        return "--finetune without --load: give the checkpoint to start from"
    if a.resume is None or c.finetune:
        return None
    if a.resume[1].iteration >= a.training.train_iters:
        return (
            f"--train-iters {a.training.train_iters}: the checkpoint is at iteration {a.resume[1].iteration} already; "
            "raise it, or start anew from its weights with --finetune"
        )
    if c.load_optim and not a.resume[1].has_optimizer:
        return f"--load {c.load}: saved with --no-save-optim; continue with --no-load-optim or --finetune"
    if c.load_optim and a.resume[1].precision != a.precision.name:
        return (
            f"--load {c.load}: its optimizer is of a {a.resume[1].precision} run, this one is {a.precision.name}; use "
            "the same precision, or continue with --no-load-optim or --finetune"
        )
    if c.load_optim and a.resume[1].decoupled_lr != (a.learning_rate.decoupled_lr is not None):
        was, now = ("saved with", "give it") if a.resume[1].decoupled_lr else ("saved without", "leave it out")
        return f"--load {c.load}: {was} --decoupled-lr; {now}, or continue with --no-load-optim or --finetune"
    return None


def check_objective(a: Arguments) -> str | None:
    m = a.multi_task
    if m.task_balance != "static" and m.mft_loss not in WEIGHTED:
        return (
            f"--task-balance {m.task_balance} gives weights to tasks, which --mft-loss {m.mft_loss} does not take; use "
            "task-token or task-sample, or leave it out"
        )
    if m.task_weights and m.mft_loss in FOCAL:
        return f"--task-weights has no meaning with --mft-loss {m.mft_loss}; its weights are --focal-alpha"
    if m.task_weights and m.mft_loss not in WEIGHTED:
        return (
            f"--task-weights has no meaning with --mft-loss {m.mft_loss}, where tasks are not balanced; use "
            "task-token or task-sample"
        )
    if m.task_weights and m.task_balance != "static":
        return f"--task-weights and --task-balance {m.task_balance} both set the weights; leave one of them out"
    if m.mft_normalization == "micro-batch" and m.mft_loss in FOCAL:
        return (
            f"--mft-normalization micro-batch is for comparison with MFTCoder's releases, which have no {m.mft_loss}; "
            "leave it out"
        )
    return None


def check_stopping(a: Arguments) -> str | None:
    v, c = a.validation, a.checkpoint
    for name, wanted in (
        ("--early-stopping-patience", v.early_stopping_patience),
        ("--task-early-stopping-patience", v.task_early_stopping_patience),
        ("--save-best", c.save_best),
    ):
        if wanted and v.eval_iters == 0:
            return f"{name} needs evaluations, and --eval-iters 0 turns them off; leave one of them out"
    if v.early_stopping_metric == "objective" and (
        a.multi_task.task_balance != "static" or v.task_early_stopping_patience
    ):
        return (
            "--early-stopping-metric objective: its weights change during the run, so that evaluations do not compare; "
            "use macro or a task"
        )
    if c.save_best and c.save is None:
        return "--save-best without --save: give --save DIR"
    if v.task_early_stopping_patience and a.multi_task.mft_loss in ("token", "sample"):
        return (
            "--task-early-stopping-patience sets the weights of tasks, which --mft-loss "
            f"{a.multi_task.mft_loss} does not have; use another loss, or leave it out"
        )
    return None


CHECKS = (
    check_ranges,
    check_heads,
    check_positions,
    check_layout,
    check_virtual_stages,
    check_batch_schedule,
    check_batches,
    check_schedule,
    check_weight_decay,
    check_checkpointing,
    check_objective,
    check_stopping,
)

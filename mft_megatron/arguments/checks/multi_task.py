"""Check the objective, its weights and early stopping."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.loss_names import FOCAL, WEIGHTED


def check_objective(a: Arguments) -> str | None:
    """Check that loss, balancer, weights and normalisation fit each other."""
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
    if m.mft_normalization == "epoch" and m.mft_loss in FOCAL:
        return (
            f"--mft-normalization epoch adds up the losses of steps, and in --mft-loss {m.mft_loss} each is multiplied "
            "by a power of what the model misses at that step, so that the sum is no objective over an epoch; use "
            "--mft-normalization global, or task-token or task-sample"
        )
    return None


def check_stopping(a: Arguments) -> str | None:
    """Check that evaluations give what early stopping and the best checkpoint need."""
    v, c = a.validation, a.checkpoint
    for name, wanted in (
        ("--early-stopping-patience", v.early_stopping_patience),
        ("--task-early-stopping-patience", v.task_early_stopping_patience),
        ("--save-best", c.save_best),
        ("--skip-train", v.skip_train),
        ("--full-validation", v.full_validation),
    ):
        if wanted and v.eval_iters == 0:
            return f"{name} needs evaluations, and --eval-iters 0 turns them off; leave one of them out"
    if v.full_validation and v.eval_iters is not None:
        return f"--full-validation and --eval-iters {v.eval_iters} both say how much to evaluate on; give one of them"
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

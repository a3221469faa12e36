"""The JSON objects of ``metrics.jsonl``, made from reports and plans (docs/FORMATS.md, docs/LOSSES.md §5)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mft_megatron.batch import StepPlan
from mft_megatron.mcore.trainer import EvaluationReport, StepReport

from .progress import Progress

# a realised share of the objective that is further from its target, as a part of it, is worth a warning
SHARE_TOLERANCE = 0.05


def train_record(
    progress: Progress,
    report: StepReport,
    plan: StepPlan,
    tokens: int,
    step_time: float,
    balance_time: float,
    task_names: Sequence[str],
    weighted: bool,
    each_layer: bool = False,
) -> dict[str, Any]:
    """One logged step.

    Args:
        progress: after the step.
        report: of the step.
        plan: of the step; its counts must be what the step has really seen.
        tokens: tokens of all samples in the global batch, padding left out.
        step_time: mean seconds of the steps since the last record, without what the balancer took.
        balance_time: mean seconds a step that the balancer's validation draws took, on top of ``step_time``.
        task_names: K names.
        weighted: whether weights are target shares, so that ``target_share`` is ``w_i / W`` over the tasks present.
        each_layer: losses of experts also by layer, not their means over the layers that have experts alone.

    Raises:
        RuntimeError: the supervised tokens seen differ from those planned; then every coefficient was wrong.
    """
    seen_K = report.tokens_K.cpu().numpy().astype(np.int64)
    if not np.array_equal(seen_K, plan.supervised_tokens_K):
        raise RuntimeError(
            f"step {progress.step}: supervised tokens per task are {seen_K.tolist()}, the data set's index says "
            f"{plan.supervised_tokens_K.tolist()}; the data set does not match its index, preprocess it again"
        )
    loss_K, share_K = report.loss_K.cpu().numpy(), report.share_K.cpu().numpy()
    target_K = np.where(seen_K > 0, report.weight_K, 0.0)
    tasks = {
        name: {
            "loss": _ratio(loss_K[i], seen_K[i]),
            "supervised_tokens": int(seen_K[i]),
            "samples": int(plan.samples_K[i]),
            "weight": float(report.weight_K[i]),
            "target_share": _ratio(target_K[i], target_K.sum()) if weighted else None,
            "share": _ratio(share_K[i], share_K.sum()),
        }
        for i, name in enumerate(task_names)
    }
    return {
        "kind": "train",
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": report.learning_rate,
        **({"loss_scale": report.loss_scale} if report.loss_scale is not None else {}),
        **({"zeros_in_grad": report.zeros_in_grad} if report.zeros_in_grad is not None else {}),
        "global_batch_size": len(plan.packs_G),
        "tokens": tokens,
        "supervised_tokens": int(seen_K.sum()),
        "step_time": step_time,
        "balance_time": balance_time,
        "balance_share": balance_time / (step_time + balance_time),
        **_of_experts(report, each_layer),
        "tasks": tasks,
    }


def _of_experts(report: StepReport, each_layer: bool) -> dict[str, Any]:
    """Balancing and z losses, as ``{"moe": {"z_loss": …, "layers": {"1": {"z_loss": …}, …}}}``."""
    losses = {name: values.cpu().numpy() for name, values in report.expert_losses.items()}
    if not losses:
        return {}
    record = {name: float(np.nanmean(values)) for name, values in losses.items()}
    if each_layer:
        numbers = np.flatnonzero(~np.isnan(next(iter(losses.values()))))
        record["layers"] = {
            str(number + 1): {name: float(values[number]) for name, values in losses.items()} for number in numbers
        }
    return {"moe": record}


def share_warning(record: dict[str, Any], normalization: str) -> str | None:
    """What to say where a task's realised share of the objective is not what its weight asks for, or ``None``.

    Args:
        record: from :func:`train_record`.
        normalization: ``--mft-normalization``.
    """
    off = [
        f"{name} has {task['share']:.1%} for {task['target_share']:.1%}"
        for name, task in record["tasks"].items()
        if task["target_share"] and abs(task["share"] / task["target_share"] - 1) > SHARE_TOLERANCE
    ]
    if not off:
        return None
    if normalization == "micro-batch":
        why = (
            "--mft-normalization micro-batch divides by the weights of the tasks that happen to share a micro-batch, "
            "so that a weight counts for less the fewer they are; the default, global, gives every task its share"
        )
    else:
        why = "under global normalisation only rounding can do this; please report it"
    return f"realised shares of the objective: {', '.join(off)}; {why}"


def valid_record(progress: Progress, report: EvaluationReport, task_names: Sequence[str]) -> dict[str, Any]:
    """One evaluation.

    ``loss`` is the training objective over the whole split, ``null`` where no task with a weight has a sample there;
    ``token_loss`` the mean over all supervised tokens; ``macro_loss`` the mean of the tasks' means. Tasks without
    validation samples have ``null``.
    """
    loss_K, tokens_K = report.loss_K.cpu().numpy(), report.tokens_K.cpu().numpy()
    tasks = {}
    for i, name in enumerate(task_names):
        loss = _ratio(loss_K[i], tokens_K[i])
        perplexity = None if loss is None else math.exp(min(loss, 700.0))
        tasks[name] = {"loss": loss, "perplexity": perplexity, "supervised_tokens": int(tokens_K[i])}
    present = [task["loss"] for task in tasks.values() if task["loss"] is not None]
    return {
        "kind": "valid",
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
        "loss": report.loss if report.share_K.sum() else None,
        "token_loss": _ratio(loss_K.sum(), tokens_K.sum()),
        "macro_loss": sum(present) / len(present) if present else None,
        "tasks": tasks,
    }


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None

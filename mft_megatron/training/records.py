"""Records of steps and evaluations in ``metrics.jsonl`` (docs/FORMATS.md, docs/LOSSES.md §5)."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, TypedDict

import numpy as np

from mft_megatron.batch import StepPlan
from mft_megatron.losses.table import Loss
from mft_megatron.mcore.trainer import EvaluationReport, StepReport

from .progress import Progress
from .shares.account import RunShares

# the order of a sum of weights differs from that of the index
WEIGHTS_TOLERANCE = 1e-9

# mean losses of experts by Megatron's name, and as "layers" those of each layer by its number, counted from 1
ExpertLosses: TypeAlias = dict[str, float | dict[str, dict[str, float]]]


class TaskStep(TypedDict):
    """One task in one step, and its shares of the objective since the start of the run.

    ``None`` where a mean or a share would be 0/0, and targets of losses that have none.
    """

    loss: float | None
    supervised_tokens: int
    samples: int
    weight: float
    target_share: float | None
    share: float | None
    run_share: float | None
    run_target_share: float | None


class StepRecord(TypedDict, total=False):
    """One logged step; ``mean_loss`` is Σ c_t·l_t / Σ c_t, where ``loss`` is Σ c_t·l_t.

    Absent where the run has none: ``mean_loss`` (focal losses), ``loss_scale``, ``zeros_in_grad``, ``moe`` and the last
    two.
    """

    kind: Literal["train"]
    step: int
    consumed_samples: int
    loss: float
    mean_loss: float
    grad_norm: float | None
    lr: float
    loss_scale: float
    zeros_in_grad: int
    global_batch_size: int
    tokens: int
    supervised_tokens: int
    step_time: float
    balance_time: float
    balance_share: float
    moe: ExpertLosses
    tasks: dict[str, TaskStep]
    params_norm: float
    tflops: float


class TaskEvaluation(TypedDict):
    """One task in one evaluation; ``None`` where the validation split has no sample of it."""

    loss: float | None
    perplexity: float | None
    supervised_tokens: int


class EvaluationRecord(TypedDict):
    """One evaluation.

    ``loss`` is the training objective over the whole split, ``None`` where no task with a weight has a sample there;
    ``token_loss`` the mean over all supervised tokens; ``macro_loss`` the mean of the tasks' means.
    """

    kind: Literal["valid"]
    step: int
    consumed_samples: int
    loss: float | None
    token_loss: float | None
    macro_loss: float | None
    tasks: dict[str, TaskEvaluation]


def train_record(
    progress: Progress,
    report: StepReport,
    plan: StepPlan,
    tokens: int,
    step_time: float,
    balance_time: float,
    task_names: Sequence[str],
    loss: Loss,
    shares: RunShares,
    each_layer: bool = False,
) -> StepRecord:
    """Make the record of a step.

    Args:
        progress: after the step.
        report: of the step.
        plan: of the step; its counts must be those that the step has really seen.
        tokens: tokens of all samples in the global batch, without padding.
        step_time: mean seconds of the steps since the last record, without those of validation draws.
        balance_time: mean seconds a step of the balancer's validation draws, on top of ``step_time``.
        task_names: K names.
        loss: of the run; where weights are target shares, ``target_share`` is ``w_i / W`` over the tasks present.
        shares: of the run up to the step.
        each_layer: whether losses of experts are also recorded by layer.

    Raises:
        RuntimeError: the supervised tokens seen, or their weights, differ from those planned; then every coefficient
            was wrong.
    """
    _check_counts(report, plan, progress.step)
    record: StepRecord = {
        "kind": "train",
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
        "loss": report.loss,
    }
    if not loss.focal:
        record["mean_loss"] = report.loss / report.share_K.sum().item()
    record["grad_norm"] = report.grad_norm
    record["lr"] = report.learning_rate
    if report.loss_scale is not None:
        record["loss_scale"] = report.loss_scale
    if report.zeros_in_grad is not None:
        record["zeros_in_grad"] = report.zeros_in_grad
    record["global_batch_size"] = plan.num_packs
    record["tokens"] = tokens
    record["supervised_tokens"] = int(plan.counts.tokens_K.sum())
    record["step_time"] = step_time
    record["balance_time"] = balance_time
    record["balance_share"] = balance_time / (step_time + balance_time)
    if report.expert_losses:
        record["moe"] = _expert_losses(report, each_layer)
    record["tasks"] = _task_steps(report, plan, task_names, loss.weighted, shares)
    return record


def _check_counts(report: StepReport, plan: StepPlan, step: int) -> None:
    """Compare what a step has seen with what its coefficients were computed from.

    Raises:
        RuntimeError: they differ.
    """
    counts = plan.counts
    for what, seen, planned_K, tolerance in (
        ("supervised tokens", report.tokens_K, counts.tokens_K, 0.0),
        ("weights of supervised tokens", report.token_weights_K, counts.token_weights_K, WEIGHTS_TOLERANCE),
    ):
        seen_K = seen.cpu().numpy().astype(planned_K.dtype)
        if not np.allclose(seen_K, planned_K, rtol=tolerance, atol=0):
            raise RuntimeError(
                f"step {step}: {what} per task are {seen_K.tolist()}, the data set's index says "
                f"{planned_K.tolist()}; the data set does not match its index, preprocess it again"
            )


def _task_steps(
    report: StepReport, plan: StepPlan, task_names: Sequence[str], weighted: bool, shares: RunShares
) -> dict[str, TaskStep]:
    loss_K, share_K, tokens_K = (row_K.cpu().numpy() for row_K in (report.loss_K, report.share_K, report.tokens_K))
    token_weights_K = report.token_weights_K.cpu().numpy()
    target_K = np.where(tokens_K > 0, report.weight_K, 0.0)
    run_K, run_target_K = shares.share_K, shares.target_share_K if weighted else None
    return {
        name: {
            "loss": _quotient(loss_K[i], token_weights_K[i]),
            "supervised_tokens": int(tokens_K[i]),
            "samples": int(plan.counts.samples_K[i]),
            "weight": float(report.weight_K[i]),
            "target_share": _quotient(target_K[i], target_K.sum()) if weighted else None,
            "share": _quotient(share_K[i], share_K.sum()),
            "run_share": None if run_K is None else float(run_K[i]),
            "run_target_share": None if run_target_K is None else float(run_target_K[i]),
        }
        for i, name in enumerate(task_names)
    }


def _expert_losses(report: StepReport, each_layer: bool) -> ExpertLosses:
    losses = {name: values.cpu().numpy() for name, values in report.expert_losses.items()}
    record: ExpertLosses = {name: float(np.nanmean(values)) for name, values in losses.items()}
    if each_layer:
        layers = np.flatnonzero(~np.isnan(next(iter(losses.values()))))
        record["layers"] = {
            str(layer + 1): {name: float(values[layer]) for name, values in losses.items()} for layer in layers
        }
    return record


def valid_record(progress: Progress, report: EvaluationReport, task_names: Sequence[str]) -> EvaluationRecord:
    """Make the record of an evaluation.

    Args:
        progress: of the run when it is evaluated.
        report: of the evaluation.
        task_names: K names.
    """
    loss_K, tokens_K = report.loss_K.cpu().numpy(), report.tokens_K.cpu().numpy()
    token_weights_K = report.token_weights_K.cpu().numpy()
    tasks: dict[str, TaskEvaluation] = {}
    for i, name in enumerate(task_names):
        loss = _quotient(loss_K[i], token_weights_K[i])
        perplexity = None if loss is None else math.exp(min(loss, 700.0))
        tasks[name] = {"loss": loss, "perplexity": perplexity, "supervised_tokens": int(tokens_K[i])}
    present = [task["loss"] for task in tasks.values() if task["loss"] is not None]
    return {
        "kind": "valid",
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
        "loss": report.loss if report.share_K.sum() else None,
        "token_loss": _quotient(loss_K.sum(), token_weights_K.sum()),
        "macro_loss": sum(present) / len(present) if present else None,
        "tasks": tasks,
    }


def _quotient(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None

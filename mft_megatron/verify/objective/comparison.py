"""A step beside its reference: relative errors, the bounds that hold for a precision, and the table that is printed."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .steps import Gradient, Step


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Largest relative errors of a step that computes what it should.

    Attributes:
        share: of a task's share; coefficients are fp64 whatever the precision of the model.
        loss: of the loss and of a task's mean token loss.
        gradient: of ‖gradient - reference‖, relative to ‖reference‖; more where rounding alone makes more of it.
    """

    share: float
    loss: float
    gradient: float


# In units of u, the largest relative error of one rounding (2^-24, 2^-8 and 2^-11), losses have about 34, 3 and 4 and
# gradients about 84, 26 and 41: sums in fp32 are as long as the model is wide, those of 16 bits are kept in fp32.
# docs/VERIFY.md has what was measured.
BOUNDS: Mapping[str, Bounds] = {
    "fp32": Bounds(share=1e-9, loss=2e-6, gradient=5e-6),
    "bf16": Bounds(share=1e-9, loss=1e-2, gradient=0.1),
    "fp16": Bounds(share=1e-9, loss=2e-3, gradient=0.02),
}
# A gradient may differ by so many times what one process in the run's precision differs by: it is a sum of terms that
# partly cancel, in trained models by orders of magnitude more than in those of random weights.
ROUNDINGS = 5
# with a larger bound nothing is shown
_VACUOUS = 0.5


def bounds_of(precision: str, loss: str) -> Bounds:
    """Bounds of a run: of its precision (fp32, bf16, fp16), and ``--mft-loss``; focal coefficients depend on losses."""
    bounds = BOUNDS[precision]
    return dataclasses.replace(bounds, share=bounds.loss) if loss == "focal-sample" else bounds


@dataclasses.dataclass(frozen=True)
class Line:
    """A figure of a step.

    Attributes:
        table: of the three tables that it belongs to.
        name: task or weight.
        figures: its columns but the last, as text.
        error: relative error; infinite where one side has no such figure.
        bound: on the error.
        why: an infinite error, or one of nothing, in words.
    """

    table: str
    name: str
    figures: tuple[str, ...]
    error: float
    bound: float
    why: str = ""

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound; not where it is NaN."""
        return self.error <= self.bound

    @property
    def failure(self) -> str:
        """The figure and its error, for a list of those that do not hold."""
        return f"{self.table} {self.name}: {self.why or f'relative error {self.error:.1e}, bound {self.bound:.1e}'}"


HEADERS: Mapping[str, tuple[str, ...]] = {
    "share": ("task", "tokens", "target", "realised", "reference"),
    "loss": ("loss", "computed", "reference"),
    "gradient": ("gradient of", "norm", "reference", "rounding"),
}

_NOTHING = "shows nothing"
# Advice for a failed certificate. The keys are the tables in the order in which they are computed: a wrong share makes
# losses wrong, and a wrong loss gradients. So the advice of the first table with a figure beyond its bound is given.
HINTS: Mapping[str, str] = {
    "share": "shares come from c_t alone: look at weights, at counts of the data, and for tokens that are missing",
    "loss": "shares are right: look at labels, positions and attention, or at weights that differ between ranks",
    "gradient": "shares and losses are right: look at how gradients are summed over micro-batches and ranks",
}


def hint(lines: Sequence[Line]) -> str | None:
    """Say what to look at where some lines do not hold; ``None`` where all hold."""
    return next((hint for kind, hint in HINTS.items() if any(x.table == kind and not x.holds for x in lines)), None)


def note_of_zeros(lines: Sequence[Line]) -> str | None:
    """Name gradients that are 0 or mere rounding in all steps, so that nothing is shown; ``None`` without any."""
    gradients = [line for line in lines if line.table == "gradient"]
    zeros = sorted({line.name for line in gradients} - {line.name for line in gradients if line.why != _NOTHING})
    if not zeros:
        return None
    named = ", ".join(zeros[:2]) + (f" and {len(zeros) - 2} more" if len(zeros) > 2 else "")
    reason = "; LoRA's A has none while B is 0, certify a later checkpoint" if "lora_a" in named else ""
    return f"note: nothing is shown of gradients that are 0 on both sides or mere rounding: {named}{reason}"


def compare(
    step: Step,
    reference: Step,
    rounded: Mapping[str, Gradient],
    target_K: np.ndarray | None,
    tasks: Sequence[str],
    bounds: Bounds,
) -> list[Line]:
    """Compare a step of a run with its reference.

    Args:
        step: as the run computes it.
        reference: as it should be.
        rounded: gradients of the reference in the run's precision.
        target_K: fp64 [K], the share that each task should have; ``None`` where the loss has no target.
        tasks: names.
        bounds: of the run's precision.
    """
    return [
        *_shares(step, reference, target_K, tasks, bounds.share),
        *_losses(step, reference, tasks, bounds.loss),
        *_gradients(step.gradients, reference.gradients, rounded, bounds.gradient),
    ]


def _shares(
    step: Step, reference: Step, target_K: np.ndarray | None, tasks: Sequence[str], bound: float
) -> Iterator[Line]:
    for task, name in enumerate(tasks):
        ours, theirs = float(step.share_K[task]), float(reference.share_K[task])
        tokens = int(step.tokens_K[task])
        same = tokens == reference.tokens_K[task]
        words = f"{tokens:,}" if same else f"{tokens:,}, not {reference.tokens_K[task]:,}"
        target = "" if target_K is None else f"{target_K[task]:.6f}"
        error, why = (relative(ours, theirs), "") if same else (math.inf, f"supervised tokens are {words}")
        yield Line("share", name, (words, target, f"{ours:.6f}", f"{theirs:.6f}"), error, bound, why)
    ours, theirs = step.total, reference.total
    yield Line("share", "Σ c_t", ("", "", f"{ours:.6f}", f"{theirs:.6f}"), relative(ours, theirs), bound)


def _losses(step: Step, reference: Step, tasks: Sequence[str], bound: float) -> Iterator[Line]:
    pairs = [("objective", step.loss, reference.loss)]
    of_tasks = zip(tasks, step.task_loss_K.tolist(), reference.task_loss_K.tolist(), strict=True)
    # a task that is not in the step has no loss
    pairs += [pair for pair in of_tasks if not (math.isnan(pair[1]) and math.isnan(pair[2]))]
    for name, ours, theirs in pairs:
        yield Line("loss", name, (f"{ours:.7f}", f"{theirs:.7f}"), relative(ours, theirs), bound)


def _gradients(
    ours: Mapping[str, Gradient], theirs: Mapping[str, Gradient], rounded: Mapping[str, Gradient], bound: float
) -> Iterator[Line]:
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            why = "only one side has it"
            yield Line("gradient", name, ("", why, ""), math.inf, bound, why)
            continue
        value, disagreement = ours[name].value, ours[name].disagreement
        # bounds the error of every rank's copy
        error = _difference(value, theirs[name].value) + disagreement
        rounding = _difference(rounded[name].value, theirs[name].value)
        norms = (f"{one.norm().item():.6e}" for one in (value, theirs[name].value))
        # the first argument where rounding is NaN
        allowed = max(bound, ROUNDINGS * rounding)
        nothing = allowed > _VACUOUS or not (error or theirs[name].value.any())
        figures = (*norms, f"{rounding:.1e}")
        yield Line("gradient", name, figures, error, allowed, _NOTHING if nothing and error <= allowed else "")


def _difference(value: Tensor, reference: Tensor) -> float:
    """‖value - reference‖ / ‖reference‖; infinite where only the reference is 0."""
    wanted = _padded(reference, value)
    difference, norm = (value - wanted).norm().item(), wanted.norm().item()
    return difference / norm if norm else (math.inf if difference else 0.0)


def _padded(value: Tensor, like: Tensor) -> Tensor:
    """A gradient with the rows of another's padding of the vocabulary, where gradients are 0, or without such rows."""
    if value.shape == like.shape:
        return value
    padded = torch.zeros(max(len(value), len(like)), *value.shape[1:], dtype=value.dtype)
    padded[: len(value)] = value
    return padded[: len(like)]


def relative(ours: float, theirs: float) -> float:
    """Relative error of a number; the number itself where it should be 0, and NaN where either is."""
    return abs(ours - theirs) / abs(theirs) if theirs else abs(ours)


def table(lines: Sequence[Line]) -> list[str]:
    """Lines of text: a table for each kind of figure, each line with its error; those beyond their bound are marked."""
    text = []
    for kind, header in HEADERS.items():
        chosen = [line for line in lines if line.table == kind]
        if not chosen:
            continue
        rows = [(*header, "rel. error"), *((line.name, *line.figures, f"{line.error:.1e}") for line in chosen)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        marks = ["", *("" if line.holds else f"  MISMATCH: above {line.bound:.1e}" for line in chosen)]
        for row, mark in zip(rows, marks, strict=True):
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            text.append("  ".join(cells).rstrip() + mark)
        text.append("")
    return text

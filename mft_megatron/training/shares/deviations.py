"""Judge realised shares of a run against their targets, and explain a difference: pure functions."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .account import RunShares

# a realised share of the objective that differs from its target by more than this part of it is worth a warning
SHARE_TOLERANCE = 0.05
# more tasks than these are not listed in a warning
LISTED_TASKS = 8


@dataclasses.dataclass(frozen=True)
class EpochPacks:
    """Epochs of the training split since counting began, in packs.

    Attributes:
        length: packs of the split.
        complete: packs of the epochs that are whole.
        open: packs of the others, of which only a part is counted: the first, if counting began within it, and the
            current one.
        current: packs of the current epoch that are consumed; 0 at its end.
    """

    length: int
    complete: int
    open: int
    current: int

    @classmethod
    def between(cls, began: int, consumed: int, length: int) -> "EpochPacks":
        """The epochs of ``length`` packs between two numbers of consumed packs."""
        whole = max(consumed // length - -(-began // length), 0)
        touched = -(-consumed // length) - began // length
        return cls(length, whole * length, (touched - whole) * length, consumed % length)


def off_target(shares: RunShares, epochs: EpochPacks | None = None, tolerance: float = SHARE_TOLERANCE) -> list[int]:
    """The tasks whose realised share is not their target, the largest relative difference first.

    Args:
        shares: of the run so far.
        epochs: given where a task gets its share only over a whole epoch (``--mft-normalization epoch``) and the run
            goes on: an open epoch then excuses all that its other packs can make up for.
        tolerance: part of the target by which a share may differ from it.
    """
    share_K, target_K = shares.share_K, shares.target_share_K
    if share_K is None or target_K is None:
        return []
    low_K = high_K = target_K
    if epochs is not None and epochs.open:
        share_K = shares.realised_K
        low_K, high_K = target_K * epochs.complete, target_K * (epochs.complete + epochs.open)
    off_K = (share_K < (1 - tolerance) * low_K) | (share_K > (1 + tolerance) * high_K)
    off = np.flatnonzero(off_K & (target_K > 0))
    distance = np.maximum(low_K[off] - share_K[off], share_K[off] - high_K[off]) / target_K[off]
    return off[np.argsort(-distance, kind="stable")].tolist()


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """Circumstances of a run that may explain a difference.

    Attributes:
        normalization: ``--mft-normalization``.
        global_batch_size: the largest.
        epochs: epochs so far.
        skipped_steps: steps that updated nothing.
        packed_decreasing: whether the packs are of ``--packer decreasing``, and could be of ``mixed``.
        over: whether the run is over, so that an epoch that it has begun stays incomplete.
    """

    normalization: str
    global_batch_size: int
    epochs: EpochPacks
    skipped_steps: int = 0
    packed_decreasing: bool = False
    over: bool = False


def share_warning(shares: RunShares, off: Sequence[int], names: Sequence[str], circumstances: Circumstances) -> str:
    """The warning about tasks that :func:`off_target` found: shares, targets, the reason and the remedy.

    Args:
        shares: of the run so far.
        off: tasks, at least one.
        names: K names.
        circumstances: of the run.
    """
    share_K, target_K = shares.share_K, shares.target_share_K
    if share_K is None or target_K is None:
        raise ValueError("shares without a step or without targets cannot be off")
    by_presence = circumstances.normalization == "global"
    listed = []
    for task in off[:LISTED_TASKS]:
        absent = shares.absent_K[task]
        where = f" (absent from {absent:,} of {shares.weighted_K[task]:,})" if by_presence and absent else ""
        listed.append(f"{names[task]} has {share_K[task]:.1%} for {target_K[task]:.1%}{where}")
    if len(off) > LISTED_TASKS:
        listed.append(f"and {len(off) - LISTED_TASKS} more tasks")
    explain = {"global": _of_global, "epoch": _of_epoch, "micro-batch": _of_micro_batches}
    since = "so far" if not shares.began else f"since pack {shares.began:,}"
    steps = "1 step" if shares.steps == 1 else f"{shares.steps:,} steps"
    reason = explain[circumstances.normalization](shares, circumstances)
    return f"realised shares of the objective in {steps} {since}: {', '.join(listed)}; {reason}"


_REPORT = "only rounding can do this; please report it"


def _of_global(shares: RunShares, circumstances: Circumstances) -> str:
    if not shares.absent_K.any():
        return _other_normalizations(shares, "global") or f"under global normalisation {_REPORT}"
    remedies = [
        f"a larger --global-batch-size ({circumstances.global_batch_size} so far) puts a task into more steps",
        "--mft-normalization epoch gives each task its share over a whole epoch",
    ]
    if circumstances.packed_decreasing:
        remedies.append("packing again with --packer mixed spreads the samples of a task over more packs")
    return (
        "under global normalisation the tasks that are in a step take over the shares of those that are not: "
        + "; ".join(remedies)
    )


def _of_epoch(shares: RunShares, circumstances: Circumstances) -> str:
    epochs, reasons = circumstances.epochs, []
    if epochs.current and circumstances.over:
        reasons.append(
            f"the run ends after {epochs.current:,} of {epochs.length:,} packs of an epoch (--num-train-epochs ends it "
            "with one)"
        )
    if shares.began % epochs.length:
        reasons.append("counting began within an epoch")
    if circumstances.skipped_steps:
        steps = circumstances.skipped_steps
        reasons.append(f"{'1 step' if steps == 1 else f'{steps:,} steps'} updated nothing")
    if shares.weights_changed:
        reasons.append("weights of tasks changed within epochs")
    if others := _other_normalizations(shares, "epoch"):
        reasons.append(others)
    return f"under epoch normalisation a task has its share over a whole epoch; {', and '.join(reasons) or _REPORT}"


def _other_normalizations(shares: RunShares, now: str) -> str:
    """Words for the normalisations of earlier steps, other than that of ``now``; empty where there are none."""
    others = [name for name in shares.normalizations if name != now]
    return f"part of the run had --mft-normalization {' and '.join(others)}" if others else ""


def _of_micro_batches(shares: RunShares, circumstances: Circumstances) -> str:
    return (
        "--mft-normalization micro-batch divides by the weights of the tasks that happen to be in one micro-batch, so "
        "that a weight counts for less the fewer they are; global gives each task that is in a step its share, epoch "
        "each task over a whole epoch"
    )

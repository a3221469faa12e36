"""Eq. 1 and its relatives written out from docs/LOSSES.md, for texts that are each alone in a row.

Nothing here reads what it checks: neither the counts beside the packs nor the coefficients of the losses room. Weights
and masks are read where preprocessing stored them, and everything is counted again.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mft_megatron.arguments.groups.multi_task import MultiTaskArguments
from mft_megatron.data.loading.dataset import PackedDataset, PackedSplit
from mft_megatron.errors import InputError

BY_SAMPLE = ("sample", "task-sample", "focal-sample")
# losses in which every token counts alike, whatever its task
WITHOUT_TASKS = ("token", "sample")
LOSSES = ("token", "sample", "task-token", "task-sample", "focal-sample")
_PACKS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens that attend to each other: a sample slice, or in a joined data set all of a pack's.

    Attributes:
        task: index of the task.
        tokens: int64 [n].
        turn_weights: fp64 [n - 1], ``u_t`` of tokens 1 to n - 1; 0 where the token is not supervised.
        sample_weight: ``v_j``.
    """

    task: int
    tokens: np.ndarray
    turn_weights: np.ndarray
    sample_weight: float

    @property
    def supervised(self) -> bool:
        """Whether any token of it counts."""
        return self.sample_weight > 0 and bool(self.turn_weights.any())


class StoredSamples:
    """Tokens and weights of the samples of a data set, as they are on disk."""

    def __init__(self, dataset: PackedDataset):
        self._dataset = dataset
        of_samples, of_tokens = f"{dataset.prefix}_sample_weights.npy", f"{dataset.prefix}_token_weights.bin"
        self._of_samples = np.load(of_samples, "r") if Path(of_samples).is_file() else None
        self._of_tokens = np.memmap(of_tokens, np.float32, "r") if Path(of_tokens).is_file() else None

    def texts(self, split: PackedSplit, packs: Sequence[int]) -> Iterator[Text]:
        """Yield the texts of some packs of a split; -1, an empty row, has none."""
        tokens, mask = self._dataset.tokens, self._dataset.mask
        for pack in packs:
            parts = []
            slices = split.slices_of(pack)
            for sample, start, length in zip(slices.samples, slices.starts, slices.lengths, strict=True):
                first = int(tokens.start_of(sample)) + int(start)
                where = slice(first, first + int(length))
                weights = np.asarray(mask.items[where], np.float64)
                if self._of_tokens is not None:
                    weights = weights * self._of_tokens[where]
                weight = 1.0 if self._of_samples is None else float(self._of_samples[sample])
                task = int(self._dataset.task_ids[sample])
                parts.append(Text(task, np.asarray(tokens.items[where], np.int64), weights[1:], weight))
                if self._dataset.joined:
                    parts[-1] = dataclasses.replace(parts[-1], turn_weights=weights)
            yield from _joined(parts) if self._dataset.joined else parts


def _joined(parts: Sequence[Text]) -> Iterator[Text]:
    """The slices of a joined pack, which has one task, as one text."""
    if parts:
        tokens = np.concatenate([part.tokens for part in parts])
        weights = np.concatenate([part.turn_weights for part in parts])
        yield Text(parts[0].task, tokens, weights[1:], parts[0].sample_weight)


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counts of some packs, and sums of weights, by task.

    Attributes:
        packs: number of packs that are not empty.
        tokens_K: int64 [K], supervised tokens.
        token_weights_K: fp64 [K], ``T_i``.
        sample_weights_K: fp64 [K], ``M_i``.
    """

    packs: int
    tokens_K: np.ndarray
    token_weights_K: np.ndarray
    sample_weights_K: np.ndarray


def count(texts: Sequence[Text], packs: int, num_tasks: int) -> Totals:
    """Count texts, which are those of ``packs`` packs of ``num_tasks`` tasks."""
    total = Totals(packs, np.zeros(num_tasks, np.int64), np.zeros(num_tasks), np.zeros(num_tasks))
    for text in texts:
        if text.supervised:
            total.tokens_K[text.task] += np.count_nonzero(text.turn_weights)
            total.token_weights_K[text.task] += text.sample_weight * text.turn_weights.sum()
            total.sample_weights_K[text.task] += text.sample_weight
    return total


def count_pass(samples: StoredSamples, split: PackedSplit) -> Totals:
    """Count every pack of a split once."""
    blocks = (range(at, min(at + _PACKS_AT_ONCE, split.num_packs)) for at in range(0, split.num_packs, _PACKS_AT_ONCE))
    totals = [count(list(samples.texts(split, block)), len(block), split.num_tasks) for block in blocks]
    return Totals(
        split.num_packs,
        *(
            np.sum([getattr(total, name) for total in totals], axis=0)
            for name in ("tokens_K", "token_weights_K", "sample_weights_K")
        ),
    )


def refuse_loss(loss: str, normalization: str) -> None:
    """Refuse an objective that nothing here writes out.

    Raises:
        InputError: the reason.
    """
    if loss not in LOSSES:
        raise InputError(
            f"--mft-loss {loss}: a step of it reads statistics of the step before, so one step has no reference; "
            f"certify the layout with one of: {', '.join(LOSSES)}"
        )
    if normalization == "micro-batch":
        raise InputError(
            "--mft-normalization micro-batch: its loss depends on which rows share a micro-batch of which rank, so "
            "there is nothing to compare it with; give global or epoch"
        )


def task_factors(loss: str, weight_K: np.ndarray, step: Totals, of_pass: Totals | None) -> np.ndarray:
    """The part of ``c_t`` that all tokens of a task have in common.

    Args:
        loss: one of :data:`LOSSES`.
        weight_K: fp64 [K], ``w_i``, or ``alpha_i``.
        step: counts of the global batch.
        of_pass: counts of the whole pass, with ``--mft-normalization epoch``; otherwise ``None``.

    Returns:
        fp64 [K]; ``c_t`` is this times ``v_j·u_t``, and for losses by sample divided by ``T_j``.
    """
    over = step if of_pass is None else of_pass
    mass_K = over.sample_weights_K if loss in BY_SAMPLE else over.token_weights_K
    steps = 1.0 if of_pass is None else of_pass.packs / step.packs
    if loss in WITHOUT_TASKS:
        return np.full(len(mass_K), steps / mass_K.sum() if mass_K.any() else 0.0)
    present_K = (mass_K > 0) & (weight_K > 0)
    divisor = present_K.sum() if loss == "focal-sample" else weight_K[present_K].sum()
    factor_K = np.zeros(len(mass_K))
    factor_K[present_K] = steps * weight_K[present_K] / (divisor * mass_K[present_K])
    return factor_K


def coefficients(loss: str, text: Text, factor: float) -> np.ndarray:
    """``c_t`` of tokens 1 to n - 1 of a text, fp64 [n - 1]; of focal-sample before the sample's own factor.

    Args:
        loss: one of :data:`LOSSES`.
        text: that the tokens belong to.
        factor: of its task, from :func:`task_factors`.
    """
    if not text.supervised:
        return np.zeros_like(text.turn_weights)
    by_sample = text.turn_weights.sum() if loss in BY_SAMPLE else 1.0
    return factor * text.sample_weight * text.turn_weights / by_sample


def targets(loss: str, weight_K: np.ndarray, step: Totals, of_pass: Totals | None) -> np.ndarray | None:
    """The share that the options ask for each task, fp64 [K]: of the step, or of a pass where that normalises it.

    ``None`` for losses that have no target.
    """
    if loss not in ("task-token", "task-sample"):
        return None
    present_K = weight_K * ((step if of_pass is None else of_pass).token_weights_K > 0)
    return present_K / present_K.sum() if present_K.any() else present_K


def asked_weights(options: MultiTaskArguments, tasks: Sequence[str], of_data: Sequence[float | None]) -> np.ndarray:
    """``w_i``, or ``alpha_i``, as the command line and the data set say them, fp64 [K]; they have been checked.

    Args:
        options: of the command line.
        tasks: names.
        of_data: weights from the task file; ``None`` for a task without one.
    """
    focal = options.mft_loss == "focal-sample"
    given = (options.focal_alpha if focal else options.task_weights) or ()
    if len(given) == 1 and given[0].startswith("["):
        return np.array(json.loads(given[0]), np.float64)
    named = {name: float(number) for name, number in (word.rsplit("=", 1) for word in given)}
    takes_data = options.mft_loss in ("task-token", "task-sample")
    defaults = [1.0 if weight is None or not takes_data else weight for weight in of_data]
    return np.array([named.get(name, default) for name, default in zip(tasks, defaults, strict=True)])

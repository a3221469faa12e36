"""Packs that a run leaves out because a step with them was bad, so that it went back to a checkpoint before them.

::

    bad step ─► DIR/left_out.json, before the run goes back ─► the plan of a step without these packs, also after a kill

Packs are named by their positions in the stream of packs (:mod:`mft_megatron.data.loading.step_plan`), so another
global batch size leaves out exactly the same ones.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedSplit
from mft_megatron.errors import InputError
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.parsing.typed_json import from_json
from mft_megatron.run_folder.names import LEFT_OUT
from mft_megatron.run_folder.replace_text import replace_text


@dataclasses.dataclass(frozen=True)
class LeftOutBatch:
    """A global batch that is left out.

    Attributes:
        first: packs of the stream before it.
        packs: its packs.
        step: its step.
        checkpoint: steps of the checkpoint that the run went back to.
        reason: why the step was bad.
        stream: data set, seed and order of the stream.
    """

    first: int
    packs: int
    step: int
    checkpoint: int
    reason: str
    stream: str


class LeftOut:
    """The global batches that a run leaves out, the same on every rank; in ``DIR/left_out.json`` and in checkpoints.

    Attributes:
        batches: of this stream, in the order in which they were found.
    """

    def __init__(self, folder: Path | None, stream: str):
        """
        Args:
            folder: the run folder, if there is one.
            stream: data set, seed and order of the packs; batches of another stream are ignored.
        """
        self._folder, self._stream = folder, stream
        self._others: list[LeftOutBatch] = []
        self.batches: list[LeftOutBatch] = []

    def load(self, stored: Sequence[dict[str, int | str]]) -> None:
        """Take the batches of a checkpoint and of the run folder; a collective.

        Args:
            stored: of a checkpoint.

        Raises:
            InputError: the file in the run folder is damaged; on every rank.
        """
        of_file = self._read() if process_groups.is_main() else None
        text = process_groups.first_of_any_rank(of_file)
        found = [LeftOutBatch(**cast(dict[str, Any], batch)) for batch in stored]
        if text is not None:
            try:
                found += [from_json(LeftOutBatch, batch) for batch in json.loads(text)]
            except (ValueError, TypeError, RecursionError) as error:
                raise InputError(
                    f"{self._folder}/{LEFT_OUT}: no list of left-out batches ({error}); remove it, and batches that "
                    "were bad are trained on again"
                ) from None
        different = list(dict.fromkeys(found))
        self.batches = [batch for batch in different if batch.stream == self._stream]
        self._others = [batch for batch in different if batch.stream != self._stream]

    def state(self) -> list[dict[str, int | str]]:
        """The batches of this stream for a checkpoint."""
        return [dataclasses.asdict(batch) for batch in self.batches]

    def add(self, step: int, first: int, packs: int, checkpoint: int, reason: str) -> None:
        """Leave out one more batch, and write that into the run folder before it has an effect; a collective.

        Arguments as the attributes of :class:`LeftOutBatch`.

        Raises:
            InputError: the file cannot be written; on every rank.
        """
        self.batches.append(LeftOutBatch(first, packs, step, checkpoint, reason, self._stream))
        if self._folder is not None:
            file = self._folder / LEFT_OUT
            text = json.dumps([dataclasses.asdict(batch) for batch in (*self._others, *self.batches)], indent=1)
            consequence = "the run cannot leave the batch out after a restart, and does not go back"
            process_groups.write_on_main(file, lambda: replace_text(file, f"{text}\n"), consequence)

    def divide(self, split: PackedSplit, plan: StepPlan, consumed: int) -> tuple[StepPlan, StepPlan | None]:
        """Divide the plan of a step.

        Args:
            split: of the packs.
            plan: of the step; its packs are in the order of the stream.
            consumed: packs of the stream before it.

        Returns:
            the plan with an empty row for each pack that is left out; and one with these packs alone, ``None`` where
            there is none.
        """
        position_G = consumed + np.arange(len(plan.packs_G))
        out_G = np.zeros(len(plan.packs_G), bool)
        for batch in self.batches:
            out_G |= (position_G >= batch.first) & (position_G < batch.first + batch.packs)
        out_G &= plan.packs_G >= 0
        if not out_G.any():
            return plan, None
        return _only(split, plan, ~out_G), _only(split, plan, out_G)

    def _read(self) -> str | None:
        file = None if self._folder is None else self._folder / LEFT_OUT
        return file.read_text(errors="replace") if file is not None and file.exists() else None


def _only(split: PackedSplit, plan: StepPlan, rows_G: np.ndarray) -> StepPlan:
    """A plan with some of its rows, bool [G]; the others are empty."""
    packs_G = np.where(rows_G, plan.packs_G, -1)
    costs_G = np.where(rows_G, plan.costs_G, 0)
    return StepPlan(packs_G, split.counts(packs_G), plan.epochs_G, costs_G)

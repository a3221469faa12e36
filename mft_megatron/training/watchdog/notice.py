"""Notices of ranks: where each was last and in what state, as they are put on the board and into reports."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from mft_megatron.progress_marks import Position

# states of a rank
RUNNING, STALLED, LEFT = "running", "stalled", "left"
LISTED_PACKS = 32


@dataclasses.dataclass(frozen=True)
class Notice:
    """A rank's word about itself.

    Attributes:
        rank: of the process.
        host: its machine.
        pid: its process id there.
        born: when that process began, in the kernel's clock ticks, which tells it from a later one of the same id.
        state: RUNNING, STALLED, or LEFT after an error.
        place: step and phase in words.
        idle: seconds without progress when it was written.
        time: when it was written, in seconds since the epoch.
        also: the line of code where its main thread was, or the error that it left with.
        waits: whether it waited there for other ranks.
    """

    rank: int
    host: str
    pid: int
    born: int
    state: str
    place: str
    idle: float
    time: float
    also: str = ""
    waits: bool = False

    def as_text(self) -> str:
        """The notice as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_text(text: str) -> "Notice":
        """The notice that :meth:`as_text` made."""
        return Notice(**json.loads(text))


def place_of(position: Position) -> str:
    """Step and phase of a position in words, without packs: ``step 5, read micro-batch 2``."""
    where = dict(position.mark.where)
    where.pop("packs", None)
    split, micro_batch = where.pop("split", None), where.pop("micro_batch", None)
    phase = position.mark.phase
    if micro_batch is not None:
        phase = f"{phase} {micro_batch}" if phase == "micro-batch" else f"{phase} micro-batch {micro_batch}"
        phase += f" of the {split} split" if split not in (None, "train") else ""
    details = [f"{name} {value}" for name, value in where.items()]
    words = [phase, *details] if position.step is None else [f"step {position.step}", phase, *details]
    return ", ".join(words)


def packs_of(position: Position) -> list[int]:
    """Packs of the micro-batch, or of the step where there is none, without empty rows."""
    packs: Any = position.mark.where.get("packs")
    chosen: Iterable[int] = position.packs if packs is None else packs
    return [int(pack) for pack in chosen if pack >= 0]


def listed(values: list[int]) -> str:
    """Numbers as text; of many, the first and how many more."""
    text = " ".join(map(str, values[:LISTED_PACKS]))
    return f"{text} and {len(values) - LISTED_PACKS} more" if len(values) > LISTED_PACKS else text or "none"


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks as text, with ranges: ``rank 5``, ``ranks 0-4 and 7``."""
    numbers = sorted(ranks)
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"

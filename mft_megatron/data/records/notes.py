"""Notes about records that are used: keys that nothing reads, and parts that are not trained on.

Nothing of a record is passed over silently: it is used, or the record is refused, or it is counted here. Counts are
summed by task, stored in the ledger and named once, at the end of preprocessing.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping

# what is counted besides keys: name in the ledger → sentence; {n} is the number
NOTES: dict[str, str] = {
    "leading_whitespace": "the template removed leading spaces or line breaks of {n} answers; for answers that begin "
    "within a line of code, use a template that keeps them",
    "trailing_whitespace": "the template removed trailing spaces or line breaks of {n} answers",
    "answers_changed": "the template writes {n} answers otherwise than the data has them",
    "earlier_reasoning": "the template left out the reasoning of {n} answers before the last question, as on a server; "
    "those that are learnt are learnt without it, unless --split-thinking-rounds makes a sample of each round",
    "last_reasoning": "the template left out the reasoning of {n} answers after the last question; use a template that "
    "writes it, or take it out of the records",
    "rounds_split": "--split-thinking-rounds made one sample a round of {n} records with reasoning in several rounds; "
    "rounds of a record may come into different splits",
    "token_names": "records with the name of a special token in a turn, completion or document: {n}; it is text in the "
    "data, and most servers read it as that token; where it stands between texts, make a record of each",
    "two_bos": "raw prompts that begin with the name of the BOS token: {n}; the tokenizer adds one itself, so they "
    "begin with two, as on a server that gets such a prompt; take it out of them if servers get none",
    "empty_answer_not_learnt": "empty answers, which would teach to stop at once, are not learnt: {n}; "
    "--learn-empty-answers learns them",
    "developer_turn": "turns of the role developer are written as system turns: {n}; let clients of a server send the "
    "role system, as most chat templates leave out turns of developer, or refuse them",
    "marked_turn_not_learnt": "turns of other roles than the assistant that are marked to be learnt, but are not: {n}",
    "tool_turn_without_call": "answers before a tool's turn that have no tool_calls: {n}; calls written in their text "
    "are learnt as text, as the model is to write them",
}
# lines about the keys of a task, and characters of a key in them
_MOST_LINES, _LONGEST = 20, 80


@dataclasses.dataclass
class RecordNotes:
    """Counts over some records of a task.

    Attributes:
        unread_keys: records that have a key that nothing reads, by the key's path, such as ``topic`` or
            ``messages[].topic``.
        kinds: how often each kind of :data:`NOTES` was seen.
    """

    unread_keys: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __bool__(self) -> bool:
        """Whether anything was counted."""
        return bool(self.unread_keys or self.kinds)

    def add(self, other: "RecordNotes") -> None:
        """Add the counts of other records."""
        for total, counts in ((self.unread_keys, other.unread_keys), (self.kinds, other.kinds)):
            for name, n in counts.items():  # faster than update for a few names
                total[name] += n


def note_lines(
    task: str, unread_keys: Mapping[str, int], kinds: Mapping[str, int], acknowledged: Collection[str] = ()
) -> list[str]:
    """Write one line for each count of a task, in the order of the counts.

    Args:
        task: its name.
        unread_keys, kinds: as in :class:`RecordNotes`.
        acknowledged: paths of keys that the user knows of; they have no line.
    """
    shown = [key for key in unread_keys if key not in acknowledged]
    lines = [
        f"task {task}: {n:,} {'record has' if n == 1 else 'records have'} a key {_shortened(key)!r} that is not read"
        for key, n in ((key, unread_keys[key]) for key in shown[:_MOST_LINES])
    ]
    if len(shown) > _MOST_LINES:
        others = len(shown) - _MOST_LINES
        lines.append(f"task {task}: {others:,} more keys are not read; the ledger counts the records of each")
    return [
        *lines,
        *(f"task {task}: {_sentence(kind, n)}" for kind, n in kinds.items()),
    ]


def _sentence(kind: str, n: int) -> str:
    text = NOTES.get(kind, f"{kind}: {{n}}")
    if n == 1:
        text = text.replace("{n} answers", "{n} answer").replace("{n} records", "{n} record")
    return text.format(n=f"{n:,}")


def _shortened(key: str) -> str:
    return key if len(key) <= _LONGEST else f"{key[:_LONGEST]}…"

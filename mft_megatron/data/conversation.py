"""One record of a task file becomes one :class:`Conversation`, whatever shape it came in.

A record is recognised by its keys. :data:`SHAPES` is the list of shapes; a new one is a function and a line. Content is
kept as it is: nothing is stripped, mapped or joined, except where a shape says so.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

ROLES = ("system", "user", "assistant")


class RecordError(ValueError):
    """A record that cannot be read; ``reason`` is the name it is counted under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Turn:
    """``role`` is one of :data:`ROLES`, or "prompt" and "completion" in raw text."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The turns of a sample. ``raw``: they follow one another as they are, without a chat format."""

    turns: tuple[Turn, ...]
    raw: bool = False


def read_record(record: Any) -> Conversation:
    """Read one parsed JSON record.

    Raises:
        RecordError: it is no object, its shape is unknown, or a part of it has the wrong type.
    """
    if not isinstance(record, Mapping):
        raise RecordError("unknown_shape", f"a record is a JSON object, not {type(record).__name__}")
    for keys, read in SHAPES.items():
        if all(key in record for key in keys):
            return read(record)
    known = "; ".join("+".join(keys) for keys in SHAPES)
    raise RecordError("unknown_shape", f"unknown record shape with keys {sorted(map(str, record))}; known: {known}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"{name} must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError("invalid_text", f"{name} holds half a surrogate pair (character {error.start})") from None
    return value


def _chat(turns: Any, name: str, role_names: Mapping[str, str]) -> Conversation:
    """Turns ``{"role", "content"}``: an optional system turn, then user and assistant in alternation."""
    if not isinstance(turns, list) or not turns:
        raise RecordError("wrong_type", f"{name} must be a list of turns with at least one turn")
    read = []
    for number, turn in enumerate(turns):
        place = f"{name}[{number}]"
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise RecordError("wrong_type", f"{place} must be an object with role and content")
        role = turn["role"]
        if not isinstance(role, str) or role not in role_names:
            raise RecordError("unknown_role", f"{place} has the unknown role {role!r}; known: {', '.join(role_names)}")
        role = role_names[role]
        before = read[-1].role if read else None
        allowed = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[
            before
        ]
        if role not in allowed:
            raise RecordError(
                "broken_alternation",
                f"{place} is a turn of {role} after {before or 'nothing'}; expected {' or '.join(allowed)}",
            )
        read.append(Turn(role, _text(turn["content"], f"{place}.content")))
    if not any(turn.role == "assistant" for turn in read):
        raise RecordError("no_assistant_turn", f"{name} has no assistant turn, so there is nothing to learn")
    return Conversation(tuple(read))


def _messages(record: Mapping[str, Any]) -> Conversation:
    """OpenAI: ``messages`` of system, user and assistant."""
    return _chat(record["messages"], "messages", {role: role for role in ROLES})


def _chat_rounds(record: Mapping[str, Any]) -> Conversation:
    """MFTCoder: ``chat_rounds`` of system, human and bot."""
    return _chat(record["chat_rounds"], "chat_rounds", {"system": "system", "human": "user", "bot": "assistant"})


def _instruction(record: Mapping[str, Any]) -> Conversation:
    """Alpaca: ``instruction``, an ``input`` that may be empty or absent, ``output``. Instruction and input are both
    kept, with an empty line between them."""
    question = _text(record["instruction"], "instruction")
    more = "" if record.get("input") is None else _text(record["input"], "input")
    answer = _text(record["output"], "output")
    return Conversation((Turn("user", f"{question}\n\n{more}" if more else question), Turn("assistant", answer)))


def _prompt_completion(record: Mapping[str, Any]) -> Conversation:
    """Raw text: the completion follows the prompt as it is and ends with the end-of-text token. For completion and
    fill-in-the-middle tasks."""
    return Conversation(
        (
            Turn("prompt", _text(record["prompt"], "prompt")),
            Turn("completion", _text(record["completion"], "completion")),
        ),
        raw=True,
    )


def _text_record(record: Mapping[str, Any]) -> Conversation:
    """A document: every token is supervised, the end-of-text token that is added too."""
    return Conversation((Turn("completion", _text(record["text"], "text")),), raw=True)


SHAPES: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Conversation]] = {
    ("messages",): _messages,
    ("chat_rounds",): _chat_rounds,
    ("instruction", "output"): _instruction,
    ("prompt", "completion"): _prompt_completion,
    ("text",): _text_record,
}

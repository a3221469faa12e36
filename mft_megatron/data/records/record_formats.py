"""Record formats: what a line of a task file may look like, and how it becomes a :class:`Conversation`.

A new format is a function and a line in :data:`RECORD_FORMATS`. A record is read in the first format of this table
whose keys it has, unless the task names a format; keys whose value is null count as absent. Content is kept as it is:
nothing is stripped, mapped or concatenated unless a format says so.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

from .chat_turns import read_chat, read_system
from .conversation import ROLES, Conversation, RecordError, Turn
from .json_values import optional_list, require_text
from .notes import RecordNotes
from .tool_calls import read_tools

Record = Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class RecordFormat:
    """A format of records, recognised by one key of each group of ``keys``.

    Attributes:
        read: gets the record and, of each group, the first key that the record has.
        keys: groups of keys with the same meaning.
        keys_if_named: the groups for a task that names the format; ``None`` if they are the same.
    """

    read: Callable[..., Conversation]
    keys: tuple[tuple[str, ...], ...]
    keys_if_named: tuple[tuple[str, ...], ...] | None = None

    def __str__(self) -> str:
        return "+".join("|".join(group) for group in self.keys)

    def groups(self, named: bool) -> tuple[tuple[str, ...], ...]:
        """Return the groups of keys; ``named``: the task names the format."""
        return self.keys_if_named if named and self.keys_if_named else self.keys


def read_record(record: object, format_name: str = "auto", notes: RecordNotes | None = None) -> Conversation:
    """Read one record: a parsed line of JSON, or a row of a table.

    Args:
        record: a dict.
        format_name: a key of :data:`RECORD_FORMATS`, or "auto" to recognise the format by the record's keys.
        notes: counts that the record is added to; ``None`` where nobody reads them.

    Raises:
        RecordError: it is not an object, its format is unknown, or a part of it cannot be used.
    """
    if not isinstance(record, dict):
        hint = "; write one record a line, not an array" if isinstance(record, list) else ""
        raise RecordError("unknown_shape", f"a record is a JSON object, not {type(record).__name__}{hint}")
    match = _match(tuple([key for key, value in record.items() if value is not None]), format_name)
    if match is None:
        # with a null instead of text, the format's reader says so, which helps more than "missing key"
        match = _match(tuple(record), format_name)
    if match is None:
        raise _missing_keys(record, format_name)
    read, keys = match
    return read(record, *keys)


@functools.lru_cache(maxsize=256)  # the records of a file have few different sets of keys
def _match(present: tuple[str, ...], format_name: str) -> tuple[Callable[..., Conversation], list[str]] | None:
    """Find the first format that these keys fit, and the keys that it reads."""
    named = format_name != "auto"
    for candidate in (RECORD_FORMATS[format_name],) if named else RECORD_FORMATS.values():
        groups = candidate.groups(named)
        firsts = (next((key for key in group if key in present), None) for group in groups)
        keys = [key for key in firsts if key is not None]
        if len(keys) == len(groups):
            return candidate.read, keys
    return None


def _missing_keys(record: Record, format_name: str) -> RecordError:
    keys = sorted(str(key)[:40] for key in record)
    listed = f"{keys[:12]}{' …' if len(keys) > 12 else ''}"
    if format_name == "auto":
        known = "; ".join(map(str, RECORD_FORMATS.values()))
        return RecordError("unknown_shape", f"unknown record format with keys {listed}; known: {known}")
    groups = RECORD_FORMATS[format_name].groups(named=True)
    missing = next(group for group in groups if not any(key in record for key in group))
    return RecordError(
        "missing_key", f"no key {' or '.join(missing)}, which format {format_name} needs; it has {listed}"
    )


def _messages(record: Record, key: str) -> Conversation:
    """OpenAI: system (or developer), user, assistant and tool (or function), with tool calls and tools."""
    return read_chat(record, key, _MESSAGES)


def _chat_rounds(record: Record, key: str) -> Conversation:
    """MFTCoder: system, human and bot, or user and assistant."""
    return read_chat(record, key, _CHAT_ROUNDS)


def _conversations(record: Record, key: str) -> Conversation:
    """ShareGPT: turns with ``from`` and ``value``, or ``role`` and ``content``; a turn of function_call holds calls as
    JSON text."""
    return read_chat(record, key, _CONVERSATIONS, sharegpt=True)


def _instruction(record: Record, instruction: str, output: str) -> Conversation:
    """Alpaca: ``instruction``, an ``input`` that may be empty or absent, ``output``. Instruction and input are both
    kept, with an empty line between them. ``history``: earlier rounds, pairs of question and answer."""
    question = require_text(record[instruction], instruction)
    more = "" if record.get("input") is None else require_text(record["input"], "input")
    answer = require_text(record[output], output)
    rounds = []
    for index, pair in enumerate(optional_list(record, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError("wrong_type", f"history[{index}] must be a pair of question and answer")
        earlier_question, earlier_answer = (
            require_text(text, f"history[{index}][{side}]") for side, text in enumerate(pair)
        )
        rounds.append((earlier_question, earlier_answer))
    return _rounds(record, [*rounds, (f"{question}\n\n{more}" if more else question, answer)])


def _question_answer(record: Record, question: str, answer: str) -> Conversation:
    """A chat of one round."""
    return _rounds(record, [(require_text(record[question], question), require_text(record[answer], answer))])


def _rounds(record: Record, rounds: Iterable[tuple[str, str]]) -> Conversation:
    turns = read_system(record)
    for question, answer in rounds:
        turns += (Turn("user", question), Turn("assistant", answer))
    return Conversation(tuple(turns), tools=read_tools(record))


def _prompt_completion(record: Record, prompt: str, completion: str) -> Conversation:
    """Raw text: the completion follows the prompt as it is and ends with the end-of-text token. For completion and
    fill-in-the-middle tasks."""
    turns = (
        Turn("prompt", require_text(record[prompt], prompt)),
        Turn("completion", require_text(record[completion], completion)),
    )
    if record.get("system"):
        raise RecordError(
            "system_in_raw_text",
            f"{prompt}+{completion} is raw text and cannot have a system text; put it into the prompt, or read the "
            "record as a chat of one round, format question_answer",
        )
    return Conversation(turns, raw=True)


def _document(record: Record, text: str) -> Conversation:
    """A document: every token is supervised, including the end-of-text token that is added."""
    return Conversation((Turn("completion", require_text(record[text], text)),), raw=True, document=True)


RECORD_FORMATS: dict[str, RecordFormat] = {
    "messages": RecordFormat(_messages, (("messages",),)),
    "chat_rounds": RecordFormat(_chat_rounds, (("chat_rounds",),)),
    "conversations": RecordFormat(_conversations, (("conversations",),)),
    "instruction": RecordFormat(_instruction, (("instruction",), ("output", "response"))),
    "prompt_completion": RecordFormat(_prompt_completion, (("prompt",), ("completion", "response", "answer"))),
    "question_answer": RecordFormat(
        _question_answer,
        (("question", "query", "input"), ("answer", "response", "output")),
        # named by the task, it also reads as a chat what would be raw text
        (("question", "query", "input", "prompt"), ("answer", "response", "output", "completion")),
    ),
    "text": RecordFormat(_document, (("text",),)),
}

# each format's names of roles
_MESSAGES = {role: role for role in ROLES} | {"developer": "system", "function": "tool"}
_CHAT_ROUNDS = {"system": "system", "human": "user", "bot": "assistant"} | {
    "user": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
_CONVERSATIONS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

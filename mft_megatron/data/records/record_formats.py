"""Record formats: what a line of a task file may look like, and how it becomes a :class:`Conversation`.

A new format is a function and a line in :data:`RECORD_FORMATS`. A record is read in the first format of this table
whose keys it has, unless the task names a format; keys whose value is null count as absent. Content is kept as it is:
nothing is stripped, mapped or concatenated unless a format says so.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping

from .chat_turns import read_chat, read_system
from .conversation import ROLES, Conversation, RecordError, Turn
from .ignored_keys import without_keys
from .json_values import optional_list, require_text
from .known_keys import (
    FLAGS,
    LABELS,
    PASSAGES,
    REFUSED,
    SYSTEM,
    TOOLS,
    WEIGHTS,
    is_label,
    one_weight,
    record_weight,
    refuse_placeholders,
    refused_key,
)
from .notes import RecordNotes
from .reading import Reading
from .segments import REASONING
from .tool_calls import read_tools

Record = Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class RecordFormat:
    """A format of records, recognised by one key of each group of ``keys``.

    Attributes:
        read: gets the record, of each group the first key that the record has, and the findings to add to.
        keys: groups of keys with the same meaning.
        keys_if_named: the groups for a task that names the format; ``None`` if they are the same.
        also: further keys that it reads where a record has them.
        refused: further keys that it cannot honour: reason, and rest of the sentence.
    """

    read: Callable[[Record, list[str], Reading], Conversation]
    keys: tuple[tuple[str, ...], ...]
    keys_if_named: tuple[tuple[str, ...], ...] | None = None
    also: tuple[str, ...] = ()
    refused: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return "+".join("|".join(group) for group in self.keys)

    def groups(self, named: bool) -> tuple[tuple[str, ...], ...]:
        """Return the groups of keys; ``named``: the task names the format."""
        return self.keys_if_named if named and self.keys_if_named else self.keys


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How records with the same keys are read.

    Attributes:
        read: reader of their format; ``None`` where none fits.
        keys: that it gets.
        unread: keys that nothing reads.
        known: keys whose values decide whether the record can be used.
        refused: keys that refuse the record unless they are empty.
    """

    read: Callable[[Record, list[str], Reading], Conversation] | None
    keys: list[str]
    unread: tuple[str, ...]
    known: tuple[str, ...]
    refused: Mapping[str, tuple[str, str]]


def read_record(
    record: object, format_name: str = "auto", notes: RecordNotes | None = None, ignored: tuple[str, ...] = ()
) -> Conversation:
    """Read one record: a parsed line of JSON, or a row of a table.

    Args:
        record: a dict.
        format_name: a key of :data:`RECORD_FORMATS`, or "auto" to recognise the format by the record's keys.
        notes: counts that the record is added to; ``None`` where nobody reads them.
        ignored: paths of keys, such as ``topic`` or ``messages[].topic``; the record is read as if it did not have
            them, and they are counted.

    Raises:
        RecordError: it is not an object, its format is unknown, or a part of it cannot be used.
    """
    if not isinstance(record, dict):
        hint = "; write one record a line, or name the file .json" if isinstance(record, list) else ""
        raise RecordError("unknown_shape", f"a record is a JSON object, not {type(record).__name__}{hint}")
    reading = Reading()
    if ignored:
        record = without_keys(record, ignored, reading)
    plan = _plan(tuple([key for key, value in record.items() if value is not None]), format_name)
    if plan.read is None:
        # with a null instead of text, the format's reader says so, which helps more than "missing key"
        with_nulls = _plan(tuple(record), format_name)
        plan = plan if with_nulls.read is None else with_nulls
    weights: dict[str, float] = {}
    for key in plan.known:
        _check_known(record, key, plan, reading, weights)
    if plan.read is None:
        raise _missing_keys(record, format_name)
    conversation = plan.read(record, plan.keys, reading)
    if weights and (weight := one_weight(weights, "the record")) != 1:
        conversation = dataclasses.replace(conversation, weight=weight)
    if notes is not None:
        for key in dict.fromkeys(plan.unread + reading.unread) if reading.unread else plan.unread:
            # half a surrogate pair has no form in the ledger
            notes.unread_keys[key if key.isascii() else key.encode(errors="backslashreplace").decode()] += 1
        if reading.kinds:
            notes.kinds.update(reading.kinds)
    return conversation


def is_record(value: Mapping[str, object]) -> bool:
    """Whether an object has the keys of a record in some format."""
    return _plan(tuple(key for key, inner in value.items() if inner is not None), "auto").read is not None


@functools.lru_cache(maxsize=256)  # the records of a file have few different sets of keys
def _plan(present: tuple[str, ...], format_name: str) -> _Plan:
    """Find the first format that these keys fit, and what becomes of each key."""
    named = format_name != "auto"
    for candidate in (RECORD_FORMATS[format_name],) if named else RECORD_FORMATS.values():
        groups = candidate.groups(named)
        firsts = (next((key for key in group if key in present), None) for group in groups)
        keys = [key for key in firsts if key is not None]
        if len(keys) == len(groups):
            break
    else:
        return _Plan(None, [], (), tuple(key for key in present if key in REFUSED), REFUSED)
    rest = [key for key in present if key not in keys and key not in candidate.also]
    refused = {**REFUSED, **candidate.refused}
    known = [key for key in rest if key in FLAGS or key in WEIGHTS or key in LABELS or key in refused]
    return _Plan(candidate.read, keys, tuple(key for key in rest if key not in known), tuple(known), refused)


def _check_known(record: Record, key: str, plan: _Plan, reading: Reading, weights: dict[str, float]) -> None:
    """Read or refuse a key whose value decides whether the record can be used, or its weight."""
    value = record[key]
    if value is None:
        return
    if key in FLAGS or key in WEIGHTS:
        weights[key] = record_weight(key, value)
    elif key in LABELS:
        if not is_label(value, key, key):
            reading.unread += (key,)
    elif value:
        raise refused_key(key, key, *plan.refused[key])


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


def _messages(record: Record, keys: list[str], reading: Reading) -> Conversation:
    """OpenAI: system (or developer), user, assistant and tool (or function), with tool calls and tools."""
    return read_chat(record, keys, _MESSAGES, reading)


def _chat_rounds(record: Record, keys: list[str], reading: Reading) -> Conversation:
    """MFTCoder: system, human and bot, or user and assistant."""
    return read_chat(record, keys, _CHAT_ROUNDS, reading)


def _conversations(record: Record, keys: list[str], reading: Reading) -> Conversation:
    """ShareGPT: turns with ``from`` and ``value``, or ``role`` and ``content``; a turn of function_call holds calls as
    JSON text."""
    return read_chat(record, keys, _CONVERSATIONS, reading, sharegpt=True)


def _instruction(record: Record, keys: list[str], reading: Reading) -> Conversation:
    """Alpaca: ``instruction``, an ``input`` that may be empty or absent, ``output``. Instruction and input are both
    kept, with an empty line between them; so is a passage, such as Dolly's ``context``. ``history``: earlier rounds,
    pairs of question and answer."""
    instruction, output = keys
    return _rounds(record, [instruction, *PASSAGES], output, reading)


def _question_answer(record: Record, keys: list[str], reading: Reading) -> Conversation:
    """A chat of one round, with the keys that may stand beside an instruction; an instruction comes first."""
    question, answer = keys
    if question == "problem" and answer != "solution" and record.get("solution") is not None:
        why = f"stands beside {answer}, and both may be the answer to learn"
        raise refused_key("solution", "solution", "two_answers", why)
    if _are_turns(record, question, answer):
        _refuse_beside_turns(record, {"instruction", "history", *PASSAGES, *REASONING} - set(keys))
        return read_chat(record, keys, _MESSAGES, reading)
    first = ["instruction"] if record.get("instruction") and question != "instruction" else []
    return _rounds(record, [*first, question, *(key for key in PASSAGES if key != question)], answer, reading)


def _rounds(record: Record, asked: Iterable[str], answer: str, reading: Reading) -> Conversation:
    """A chat whose last question is the text of the keys ``asked`` that are there; reasoning is the last answer's."""
    texts = [require_text(record[key], key) for key in asked if record.get(key) is not None]
    question = "\n\n".join(texts[:1] + [text for text in texts[1:] if text])
    turns = read_system(record)
    for index, pair in enumerate(optional_list(record, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError("wrong_type", f"history[{index}] must be a pair of question and answer")
        for side, role in enumerate(("user", "assistant")):
            turns.append(Turn(role, require_text(pair[side], f"history[{index}][{side}]")))
    refuse_placeholders(question, "the question")
    reasoning = {}
    for key in REASONING:
        value = record.get(key)
        if value is not None and not isinstance(value, str):
            raise refused_key(key, key, "wrong_type", f"must be the answer's reasoning, not {type(value).__name__}")
        if value:
            reasoning[key] = require_text(value, key)
    turns += (Turn("user", question), Turn("assistant", require_text(record[answer], answer), extra=reasoning))
    return Conversation(tuple(turns), tools=read_tools(record, reading))


def _prompt_completion(record: Record, keys: list[str], reading: Reading) -> Conversation:
    """Raw text: the completion follows the prompt as it is and ends with the end-of-text token. For completion and
    fill-in-the-middle tasks. Two lists of turns are a chat, of which only the completion is trained on, as in TRL."""
    prompt, completion = keys
    if _are_turns(record, prompt, completion):
        _refuse_beside_turns(record, {"history", *PASSAGES})
        return read_chat(record, keys, _MESSAGES, reading)
    turns = (
        Turn("prompt", require_text(record[prompt], prompt)),
        Turn("completion", require_text(record[completion], completion)),
    )
    if len(record) > 2:
        for what, names in _CHAT_ONLY.items():
            for key in names:
                if record.get(key):
                    raise RecordError(
                        "system_in_raw_text" if names is SYSTEM else "unsupported_key",
                        f"{prompt}+{completion} is raw text and cannot have {what} ({key}); put it into the prompt, or "
                        "read the record as a chat of one round, format question_answer",
                    )
    return Conversation(turns, raw=True)


def _refuse_beside_turns(record: Record, keys: Collection[str]) -> None:
    """Refuse keys whose text would have no position beside lists of turns."""
    for key in record:
        if key in keys and record[key]:
            raise refused_key(key, key, *_BESIDE_TURNS)


def _are_turns(record: Record, prompt: str, completion: str) -> bool:
    """Whether prompt and completion are lists of turns."""
    lists = isinstance(record[prompt], list), isinstance(record[completion], list)
    if any(lists) and not all(lists):
        raise RecordError("wrong_type", f"{prompt} and {completion} must both be text, or both be lists of turns")
    return all(lists)


def _document(record: Record, keys: list[str], reading: Reading) -> Conversation:
    """A document: every token is supervised, including the end-of-text token that is added."""
    (text,) = keys
    return Conversation((Turn("completion", require_text(record[text], text)),), raw=True, document=True)


_QUESTIONS = ("question", "query", "problem", "input", "instruction")
_ANSWERS = ("answer", "response", "output", "solution", "completion")
_BESIDE_TURNS = "unsupported_key", "cannot be used beside turns; put it into a turn"
_CHAT = SYSTEM + TOOLS
_RAW = ("history", *PASSAGES, *SYSTEM, *TOOLS)
_ROUND = (*_RAW, *REASONING)
# parts that raw text cannot have
_CHAT_ONLY = {"a system text": SYSTEM, "tools": TOOLS, "earlier rounds": ("history",), "a passage": PASSAGES}
_REFUSED_BESIDE_TURNS = dict.fromkeys(("history", "context", "passage", "documents"), _BESIDE_TURNS)
_REFUSED_BESIDE_QUESTIONS = {"documents": ("unsupported_key", "cannot be used; put the text into the question")}

RECORD_FORMATS: dict[str, RecordFormat] = {
    "messages": RecordFormat(_messages, (("messages",),), None, _CHAT, _REFUSED_BESIDE_TURNS),
    "chat_rounds": RecordFormat(_chat_rounds, (("chat_rounds",),), None, _CHAT, _REFUSED_BESIDE_TURNS),
    "conversations": RecordFormat(_conversations, (("conversations",),), None, _CHAT, _REFUSED_BESIDE_TURNS),
    "instruction": RecordFormat(
        _instruction,
        (("instruction",), ("output", "response")),
        # others are read as question and answer, where a question beside an instruction counts
        (("instruction",), ("output", "response", "answer", "completion")),
        also=_ROUND,
        refused=_REFUSED_BESIDE_QUESTIONS,
    ),
    "prompt_completion": RecordFormat(
        _prompt_completion,
        (("prompt",), ("completion", "response", "answer")),
        also=_RAW,
        refused=_REFUSED_BESIDE_QUESTIONS,
    ),
    "question_answer": RecordFormat(
        _question_answer,
        (_QUESTIONS, _ANSWERS),
        # named by the task, it also reads as a chat what would be raw text
        ((*_QUESTIONS[:-1], "prompt", _QUESTIONS[-1]), _ANSWERS),
        also=("instruction", *_ROUND),
        refused=_REFUSED_BESIDE_QUESTIONS,
    ),
    "text": RecordFormat(_document, (("text",),)),
    # after the others, as it is a text beside them in some data
    "conversation": RecordFormat(_conversations, (("conversation",),), None, _CHAT, _REFUSED_BESIDE_TURNS),
}

# each format's names of roles
_MESSAGES = {role: role for role in ROLES} | {
    "developer": "system",
    "function": "tool",
    "tool_call": "function_call",
    "function_call": "function_call",
    "tool_response": "tool",
    "observation": "tool",
}
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
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "System": "system",
    "User": "user",
    "Assistant": "assistant",
    "bot": "assistant",
    "developer": "system",
    "function": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}

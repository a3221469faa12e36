"""One record of a task file becomes one :class:`Conversation`, whatever shape it came in.

:data:`SHAPES` lists the shapes; a new one is a function and a line. Without a forced shape a record has the first shape
of the list whose keys it has; keys whose value is null count as absent. Content is kept as it is: nothing is stripped,
mapped or joined, except where a shape says so.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
# keys of a turn, besides role and content, that chat templates read; all are text
EXTRA_KEYS = ("reasoning_content", "reasoning", "thinking", "name", "tool_call_id")

# what may follow what; "tool call" is an assistant turn that calls a tool
_FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool call": ("tool",),
    "tool": ("tool", "assistant"),
}


class RecordError(ValueError):
    """A record that cannot be read; ``reason`` is the name it is counted under, the message is one line."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Turn:
    """``role`` is one of :data:`ROLES`, or "prompt" and "completion" in raw text.

    ``learn``: False where the record says that an assistant's turn is not to be learned. ``tool_calls``: of an
    assistant, ``{"name": str, "arguments": dict}`` each, and ``"id": str`` where the record has one. ``extra``: those
    of :data:`EXTRA_KEYS` that the turn has.
    """

    role: str
    content: str
    learn: bool = True
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The turns of a sample.

    ``raw``: they follow one another as they are, without a chat format. ``document``: a ``text`` record, of which every
    token is supervised. ``tools``: the functions that the record declares, as they stand in it.
    """

    turns: tuple[Turn, ...]
    raw: bool = False
    document: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape of records, recognised by one key of each group of ``keys``.

    ``read(record, *keys)`` gets the first key of each group that the record has. ``forced_keys``: the groups where the
    shape was asked for by name; ``None`` for the same.
    """

    read: Callable[..., Conversation]
    keys: tuple[tuple[str, ...], ...]
    forced_keys: tuple[tuple[str, ...], ...] | None = None

    def __str__(self) -> str:
        return "+".join("|".join(group) for group in self.keys)


def read_record(record: Any, shape: str = "auto") -> Conversation:
    """Read one record: a parsed line of JSON, or a row of a table.

    Args:
        record: a dict.
        shape: a name of :data:`SHAPES`, or "auto": by the record's keys.

    Raises:
        RecordError: it is no object, its shape is unknown, or a part of it cannot be used.
    """
    if not isinstance(record, dict):
        hint = "; write one record a line, not an array" if isinstance(record, list) else ""
        raise RecordError("unknown_shape", f"a record is a JSON object, not {type(record).__name__}{hint}")
    match = _match(tuple([key for key, value in record.items() if value is not None]), shape)
    if match is None:
        # a null where the text should be: say that rather than that the key is missing
        match = _match(tuple(record), shape) or _refuse_keys(record, shape)
    read, keys = match
    return read(record, *keys)


@functools.lru_cache(maxsize=256)  # the records of a file have few sets of keys
def _match(present: tuple[str, ...], shape: str) -> tuple[Callable[..., Conversation], list[str]] | None:
    """The first shape that these keys fit, and the keys it is to read."""
    for candidate in SHAPES.values() if shape == "auto" else (SHAPES[shape],):
        groups = candidate.keys if shape == "auto" else candidate.forced_keys or candidate.keys
        keys = [next((key for key in group if key in present), None) for group in groups]
        if None not in keys:
            return candidate.read, keys
    return None


def _refuse_keys(record: dict[str, Any], shape: str) -> None:
    keys = sorted(str(key)[:40] for key in record)
    listed = f"{keys[:12]}{' …' if len(keys) > 12 else ''}"
    if shape == "auto":
        known = "; ".join(map(str, SHAPES.values()))
        raise RecordError("unknown_shape", f"unknown record shape with keys {listed}; known: {known}")
    groups = SHAPES[shape].forced_keys or SHAPES[shape].keys
    missing = next(group for group in groups if not any(key in record for key in group))
    raise RecordError("missing_key", f"no key {' or '.join(missing)}, which format {shape} needs; it has {listed}")


# ---------------------------------------------------------------------------------------------------------- the shapes


def _messages(record: dict[str, Any], key: str) -> Conversation:
    """OpenAI: system (or developer), user, assistant and tool (or function), with tool calls and tools."""
    return _chat(record, key, _MESSAGES)


def _chat_rounds(record: dict[str, Any], key: str) -> Conversation:
    """MFTCoder: system, human and bot, or user and assistant."""
    return _chat(record, key, _CHAT_ROUNDS)


def _conversations(record: dict[str, Any], key: str) -> Conversation:
    """ShareGPT: turns of ``from`` and ``value``, or ``role`` and ``content``; a turn of function_call holds the calls
    as JSON text."""
    return _chat(record, key, _CONVERSATIONS, sharegpt=True)


def _instruction(record: dict[str, Any], instruction: str, output: str) -> Conversation:
    """Alpaca: ``instruction``, an ``input`` that may be empty or absent, ``output``. Instruction and input are both
    kept, with an empty line between them. ``history``: earlier rounds, pairs of question and answer."""
    question = _text(record[instruction], instruction)
    more = "" if record.get("input") is None else _text(record["input"], "input")
    answer = _text(record[output], output)
    rounds = []
    for number, pair in enumerate(_list(record, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError("wrong_type", f"history[{number}] must be a pair of question and answer")
        rounds.append([_text(text, f"history[{number}][{place}]") for place, text in enumerate(pair)])
    return _rounds(record, [*rounds, (f"{question}\n\n{more}" if more else question, answer)])


def _question_answer(record: dict[str, Any], question: str, answer: str) -> Conversation:
    """A chat of one round."""
    return _rounds(record, [(_text(record[question], question), _text(record[answer], answer))])


def _prompt_completion(record: dict[str, Any], prompt: str, completion: str) -> Conversation:
    """Raw text: the completion follows the prompt as it is and ends with the end-of-text token. For completion and
    fill-in-the-middle tasks."""
    turns = (
        Turn("prompt", _text(record[prompt], prompt)),
        Turn("completion", _text(record[completion], completion)),
    )
    if record.get("system"):
        raise RecordError(
            "system_in_raw_text",
            f"{prompt}+{completion} is raw text and has no place for system; put it into the prompt, or read the "
            "record as a chat of one round, format question_answer",
        )
    return Conversation(turns, raw=True)


def _document(record: dict[str, Any], text: str) -> Conversation:
    """A document: every token is supervised, the end-of-text token that is added too."""
    return Conversation((Turn("completion", _text(record[text], text)),), raw=True, document=True)


SHAPES: dict[str, Shape] = {
    "messages": Shape(_messages, (("messages",),)),
    "chat_rounds": Shape(_chat_rounds, (("chat_rounds",),)),
    "conversations": Shape(_conversations, (("conversations",),)),
    "instruction": Shape(_instruction, (("instruction",), ("output", "response"))),
    "prompt_completion": Shape(_prompt_completion, (("prompt",), ("completion", "response", "answer"))),
    "question_answer": Shape(
        _question_answer,
        (("question", "query", "input"), ("answer", "response", "output")),
        # asked for by name it also makes a chat of what is raw text otherwise
        (("question", "query", "input", "prompt"), ("answer", "response", "output", "completion")),
    ),
    "text": Shape(_document, (("text",),)),
}

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


# ----------------------------------------------------------------------------------------------------- parts of a chat


def _rounds(record: dict[str, Any], rounds: list[Any]) -> Conversation:
    turns = _system(record)
    for question, answer in rounds:
        turns += (Turn("user", question), Turn("assistant", answer))
    return Conversation(tuple(turns), tools=_tools(record))


def _system(record: dict[str, Any]) -> list[Turn]:
    """The record's own system text as a turn; an empty one is none."""
    system = record.get("system")
    return [Turn("system", _text(system, "system"))] if system not in (None, "") else []


def _chat(record: dict[str, Any], key: str, role_names: Mapping[str, str], sharegpt: bool = False) -> Conversation:
    """Turns in their order: system first or not at all, then user and assistant by turns; an assistant that calls tools
    is followed by turns of tool, then by the assistant again. A user's turn may be the last."""
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise RecordError("wrong_type", f"{key} must be a list of turns with at least one turn")
    read = _system(record)
    before = "system" if read else ""
    assistant = learns = False
    for number, turn in enumerate(turns):
        try:
            read.append(_turn(turn, role_names, sharegpt))
        except RecordError as error:
            raise RecordError(error.reason, f"{key}[{number}]{error}") from None
        role = read[-1].role
        if role not in _FOLLOWERS[before]:
            raise RecordError(
                "broken_alternation",
                f"{key}[{number}] is a turn of {role} after {before or 'nothing'}; expected "
                f"{' or '.join(_FOLLOWERS[before])}",
            )
        before = role
        if role == "assistant":
            assistant, learns = True, learns or read[-1].learn
            if read[-1].tool_calls:
                before = "tool call"
    if not assistant:
        raise RecordError("no_assistant_turn", f"{key} has no assistant turn, so there is nothing to learn")
    if not learns:
        raise RecordError("no_learned_turn", f"{key} says train: false or weight: 0 of every assistant turn")
    return Conversation(tuple(read), tools=_tools(record) if "tools" in record else ())


def _turn(turn: Any, role_names: Mapping[str, str], sharegpt: bool) -> Turn:
    """Read one turn; messages of errors go on from the turn's place."""
    if not isinstance(turn, dict):
        raise RecordError("wrong_type", f" must be an object with role and content, not {type(turn).__name__}")
    role_key, content_key = ("from", "value") if sharegpt and "from" in turn else ("role", "content")
    given = turn.get(role_key)
    role = role_names.get(given) if isinstance(given, str) else None
    if role is None:
        if role_key not in turn:
            raise RecordError("wrong_type", f" must be an object with role and content, it has no {role_key}")
        shown = repr(given[:40]) if isinstance(given, str) else type(given).__name__
        raise RecordError("unknown_role", f" has the unknown role {shown}; known: {', '.join(role_names)}")
    content = turn.get(content_key)
    if len(turn) == 2 and type(content) is str and content.isascii() and role != "function_call":
        return Turn(role, content)  # by far the most
    calls = _tool_calls(turn)
    if role == "function_call":
        role, content, calls = "assistant", "", _calls_of_text(content, f".{content_key}")
    elif calls and role != "assistant":
        raise RecordError("wrong_type", f".tool_calls stands in a turn of {role}; only an assistant calls tools")
    elif calls and content is None:
        content = ""
    elif isinstance(content, list):
        content = _joined(content, f".{content_key}")
    elif content_key not in turn:
        raise RecordError("wrong_type", f" must be an object with role and content, it has no {content_key}")
    else:
        content = _text(content, f".{content_key}")
    extra = {key: _text(turn[key], f".{key}") for key in EXTRA_KEYS if turn.get(key) is not None}
    return Turn(role, content, _learned(turn), calls, extra)


def _joined(parts: list[Any], place: str) -> str:
    """OpenAI's content as a list of parts; only text can be learned from."""
    texts = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or (kind == "text" and "text" not in part):
            raise RecordError(
                "wrong_type", f'{place} is a list whose item {number} is no {{"type": "text", "text": …}}'
            )
        if kind != "text":
            raise RecordError(
                "unsupported_content", f"{place}[{number}] is of type {kind[:40]!r}; only text can be read"
            )
        texts.append(_text(part["text"], f"{place}[{number}].text"))
    return "".join(texts)


def _learned(turn: dict[str, Any]) -> bool:
    """Whether neither ``train`` nor ``weight`` says that the turn is not to be learned."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RecordError("wrong_type", f".train must be true or false, not {type(train).__name__}")
    if weight is not None and not isinstance(weight, (int, float)):
        raise RecordError("wrong_type", f".weight must be 0 or 1, not {type(weight).__name__}")
    if weight not in (None, 0, 1):
        raise RecordError(
            "unsupported_weight", ".weight must be 0 or 1: a token is supervised or not, shares are a matter of tasks"
        )
    return train is not False and weight != 0


def _tool_calls(turn: dict[str, Any]) -> tuple[Mapping[str, Any], ...]:
    calls = turn.get("tool_calls")
    if calls is None:
        single = turn.get("function_call")  # what tool_calls was before there could be several
        return () if single is None else (_call(single, ".function_call"),)
    if not isinstance(calls, list):
        raise RecordError("wrong_type", f".tool_calls must be a list, not {type(calls).__name__}")
    return tuple(_call(call, f".tool_calls[{number}]") for number, call in enumerate(calls))


def _calls_of_text(content: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    calls = _json(_text(content, place), place, "invalid_tool_call")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise RecordError("invalid_tool_call", f"{place} is an empty list, not a call")
    return tuple(_call(call, place) for call in calls)


def _call(call: Any, place: str) -> Mapping[str, Any]:
    """One call as name and arguments; OpenAI has them in ``function``, others at the top."""
    if not isinstance(call, dict):
        raise RecordError("invalid_tool_call", f"{place} must be an object with name and arguments")
    if call.get("type") not in (None, "function"):
        raise RecordError("invalid_tool_call", f"{place} is a call of a type other than function")
    function = call["function"] if isinstance(call.get("function"), dict) else call
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise RecordError("invalid_tool_call", f"{place} has no name of a function")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{place}.arguments", "invalid_tool_call") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RecordError("invalid_tool_call", f"{place}.arguments must be an object, not {type(arguments).__name__}")
    _check_plain(arguments, f"{place}.arguments")
    read = {"name": _text(name, f"{place}.name"), "arguments": arguments}
    if call.get("id") is not None:
        read["id"] = _text(call["id"], f"{place}.id")
    return read


def _tools(record: dict[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools", "invalid_tools") if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("invalid_tools", "tools must be a list of objects, or such a list as JSON text")
    _check_plain(tools, "tools")
    return tuple(tools)


# --------------------------------------------------------------------------------------------------------------- values


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"{name} must be a string, not {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RecordError("invalid_text", f"{name} holds half a surrogate pair (character {error.start})") from None
    return value


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if value is not None and not isinstance(value, list):
        raise RecordError("wrong_type", f"{name} must be a list, not {type(value).__name__}")
    return value or []


def _json(text: str, name: str, reason: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise RecordError(reason, f"{name} is not JSON{json_fault(error)}") from None


def json_fault(error: RecursionError | ValueError) -> str:
    """Why ``json`` could not read a text that is to be one line: words that follow "not JSON"."""
    if isinstance(error, json.JSONDecodeError):
        return f" ({error.msg}, at character {error.pos + 1})"
    if isinstance(error, RecursionError):
        return " that can be read (nested too deeply)"
    return f" that can be read (a whole number of more than {sys.get_int_max_str_digits()} digits)"


def _check_plain(value: Any, name: str) -> None:
    """Refuse what a template could not write: no JSON, or no Unicode."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RecordError("invalid_text", f"{name} holds half a surrogate pair") from None
    except RecursionError:
        raise RecordError("wrong_type", f"{name} is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise RecordError("wrong_type", f"{name} holds what JSON has no form for ({error})") from None

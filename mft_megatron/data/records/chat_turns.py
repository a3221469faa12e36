"""Turns of chat records: roles, content, order, and which assistant turns are trained on."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from .conversation import EXTRA_KEYS, Conversation, RecordError, ToolCall, Turn
from .json_values import require_text
from .known_keys import (
    FLAGS,
    LABELS,
    REFUSED_IN_TURNS,
    SYSTEM,
    TOOLS,
    WEIGHTS,
    is_label,
    one_weight,
    read_weight,
    refuse_placeholders,
    refused_key,
)
from .reading import Reading
from .tool_calls import calls_of_text, calls_of_turn, read_declarations, read_tools

# roles that may follow a role; "tool call" is an assistant turn that calls a tool
_FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user", "system"),
    "user": ("assistant",),
    "assistant": ("user", "system", "tool"),
    "tool call": ("tool",),
    "tool": ("tool", "assistant"),
}
# usual causes of another order, and what to do, by the role before and the role
_CAUSES = {
    ("", "assistant"): "the chat begins with an answer; put its question before it, or remove it",
    ("system", "assistant"): "the question is missing; put a turn of user between them",
    ("user", "user"): "the answer between them is missing; add it, or join the two questions",
    ("user", "system"): "put the turn of system before the question",
    ("assistant", "assistant"): "join the two answers, or add the question between them",
    ("tool call", "assistant"): "the tool's answer is missing; add a turn of tool after the call",
    ("tool call", "user"): "the tool's answer is missing; add a turn of tool after the call, or end the chat there",
    ("tool", "user"): "the assistant's answer is missing; add it, or end the chat there",
}
_NO_CALL = "the call is missing; a turn of tool follows an answer, which calls the tool"
_OTHER_ORDER = "put the turns into this order"
_SYSTEM = frozenset(SYSTEM)
# the role of a turn whose content is calls as JSON text
_CALLS_AS_TEXT = "function_call"


def read_system(record: Mapping[str, object]) -> list[Turn]:
    """Read the system text beside the turns as one turn; no turn if it is absent or empty.

    Raises:
        RecordError: it is not text, or two keys have different texts.
    """
    if _SYSTEM.isdisjoint(record):
        return []
    given = [key for key in SYSTEM if record.get(key) not in (None, "")]
    if not given:
        return []
    texts = [require_text(record[key], key) for key in given]
    if len(set(texts)) > 1:
        raise RecordError("two_system_texts", f"{' and '.join(given)} have different texts; keep one")
    return [Turn("system", texts[0])]


def read_chat(
    record: Mapping[str, object],
    keys: Sequence[str],
    role_names: Mapping[str, str],
    reading: Reading,
    sharegpt: bool = False,
) -> Conversation:
    """Read one or several lists of turns, which follow each other.

    The order must be: user and assistant by turns, each user's turn after any number of system turns. An assistant turn
    that calls tools is followed by tool turns, then by the assistant again; text and then calls in consecutive turns of
    the assistant are one turn. Tool turns may also follow an answer whose text holds the calls, which is counted. The
    last turn may be a user's. A system text beside the turns comes first; where the
    first turn repeats it, it is one turn.

    Args:
        record: the whole record, which may also have a system text and declarations of tools.
        keys: of the lists; assistant turns are trained on in the last one.
        role_names: the format's names of roles → :data:`~.conversation.ROLES`, or "function_call".
        reading: findings, which are added to.
        sharegpt: turns may have ``from`` and ``value`` instead of ``role`` and ``content``.

    Raises:
        RecordError: a turn cannot be read, turns are in another order, or no assistant turn is trained on.
    """
    read = read_system(record)
    before = "system" if read else ""
    beside = len(read)
    assistant = learns = False
    flags: set[str] = set()  # that exclude an answer
    for key in keys:
        turns = record[key]
        if not isinstance(turns, list) or not turns:
            hint = ", not text; write the list itself" if isinstance(turns, str) else ""
            raise RecordError("wrong_type", f"{key} must be a list of turns with at least one turn{hint}")
        path = f"{key}[]"
        for index, turn in enumerate(turns):
            try:
                now = _turn(turn, role_names, sharegpt, path, reading)
            except RecordError as error:
                raise RecordError(error.reason, f"{key}[{index}]{error}") from None
            role = now.role
            if role == "assistant":
                if not now.learn:
                    flags.update(flag for flag in (*FLAGS, *WEIGHTS) if turn.get(flag) is not None)
                if key != keys[-1]:
                    now = dataclasses.replace(now, learn=False)
                if before in ("assistant", "tool call") and now.tool_calls and not now.content:
                    now = _joined(read.pop(), now, f"{key}[{index}]")
                    before = "user"
                assistant, learns = True, learns or now.learn
            if role not in _FOLLOWERS[before]:
                raise _wrong_order(f"{key}[{index}]", before, role)
            if role == "tool" and before == "assistant":
                reading.kinds += ("tool_turn_without_call",)
            if beside and len(read) == 1 and role == "system" and now.content == read[0].content:
                read.clear()
            read.append(now)
            before = "tool call" if now.tool_calls else role
    where = " and ".join(keys)
    if not assistant:
        raise RecordError("no_assistant_turn", f"{where}: no assistant turn, so there is nothing to learn")
    if not learns:
        why = f"{', '.join(sorted(flags))} in every assistant turn" if flags else f"no assistant turn in {keys[-1]}"
        raise RecordError("no_learned_turn", f"{where}: {why}, so there is nothing to learn")
    return Conversation(tuple(read), tools=read_tools(record, reading))


def _wrong_order(name: str, before: str, role: str) -> RecordError:
    cause = _CAUSES.get((before, role), _NO_CALL if role == "tool" else _OTHER_ORDER)
    expected = " or ".join(_FOLLOWERS[before])
    return RecordError(
        "broken_alternation", f"{name} is a turn of {role} after {before or 'nothing'}; expected {expected}: {cause}"
    )


def _joined(text: Turn, calls: Turn, name: str) -> Turn:
    """Join an answer's text, or its first calls, with the calls in the turn after it."""
    different = [key for key in calls.extra if text.extra.get(key, calls.extra[key]) != calls.extra[key]]
    if different:
        raise RecordError("broken_alternation", f"{name} continues an answer, but has another {different[0]}")
    if text.learn is not calls.learn:
        raise RecordError("broken_alternation", f"{name} continues an answer of which the flags exclude a part only")
    if text.weight != calls.weight:
        raise RecordError("broken_alternation", f"{name} continues an answer, but has another weight")
    return dataclasses.replace(
        text, tool_calls=(*text.tool_calls, *calls.tool_calls), extra={**text.extra, **calls.extra}
    )


def _turn(turn: object, role_names: Mapping[str, str], sharegpt: bool, turns: str, reading: Reading) -> Turn:
    """Read one turn; error messages begin where the turn's position in the record ends."""
    if not isinstance(turn, dict):
        raise RecordError("wrong_type", f" must be an object with role and content, not {type(turn).__name__}")
    role_key, content_key = ("from", "value") if sharegpt and "from" in turn else ("role", "content")
    role = _role(turn, role_key, role_names)
    if role == "system" and turn[role_key] == "developer":
        reading.kinds += ("developer_turn",)
    content = turn.get(content_key)
    if role == "user" and type(content) is str:
        refuse_placeholders(content, f".{content_key}")
    if len(turn) == 2 and type(content) is str and content.isascii() and role != _CALLS_AS_TEXT:
        return Turn(role, content)  # fast path for most turns
    weight = _checked_keys(turn, role, role_key, content_key, turns, reading)
    calls: tuple[ToolCall, ...] = calls_of_turn(turn, turns, reading)
    if role == _CALLS_AS_TEXT:
        role, text = "assistant", ""
        calls = (*calls_of_text(content, f".{content_key}", turns, reading), *calls)
    elif calls and role != "assistant":
        raise RecordError("wrong_type", f".tool_calls is in a turn of {role}; only an assistant calls tools")
    elif calls and content is None:
        text = ""
    elif isinstance(content, list):
        text = _concatenated(content, f".{content_key}", f"{turns}.{content_key}[]", reading)
    elif content_key not in turn:
        raise RecordError("wrong_type", f" must be an object with role and content, it has no {content_key}")
    else:
        text = require_text(content, f".{content_key}")
    extra = {key: require_text(turn[key], f".{key}") for key in EXTRA_KEYS if turn.get(key) is not None}
    return Turn(role, text, weight > 0, calls, extra, weight or 1.0)


def _role(turn: Mapping[str, object], role_key: str, role_names: Mapping[str, str]) -> str:
    name = turn.get(role_key)
    if isinstance(name, str) and name in role_names:
        return role_names[name]
    if role_key not in turn:
        raise RecordError("wrong_type", f" must be an object with role and content, it has no {role_key}")
    shown = repr(name[:40]) if isinstance(name, str) else type(name).__name__
    raise RecordError("unknown_role", f" has the unknown role {shown}; known: {', '.join(role_names)}")


def _concatenated(parts: list[object], name: str, path: str, reading: Reading) -> str:
    """Read OpenAI's content as a list of parts; only text can be trained on."""
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str) or (kind == "text" and "text" not in part):
            raise RecordError("wrong_type", f'{name} is a list whose item {index} is no {{"type": "text", "text": …}}')
        if kind != "text":
            raise RecordError("unsupported_content", f"{name}[{index}] is of type {kind[:40]!r}; only text can be read")
        texts.append(require_text(part["text"], f"{name}[{index}].text"))
        others = [key for key in part if key not in ("type", "text") and part[key] is not None]
        reading.unread += tuple(f"{path}.{key}" for key in others)
    return "".join(texts)


def _checked_keys(
    turn: Mapping[str, object], role: str, role_key: str, content_key: str, turns: str, reading: Reading
) -> float:
    """Read or refuse the keys of a turn that are not its text, and note the others.

    Returns:
        weight of the turn; 0 where a flag excludes it from training.
    """
    present = tuple([key for key, value in turn.items() if value is not None])
    unread, known = _turn_keys(present, role_key, content_key)
    if unread:
        reading.unread += tuple([f"{turns}.{key}" for key in unread])
    weights: dict[str, float] = {}
    for key in known:
        value, name, path = turn[key], f".{key}", f"{turns}.{key}"
        if key in FLAGS or key in WEIGHTS:
            weights[key] = read_weight(key, value, name, path)
            if weights[key] and role not in ("assistant", _CALLS_AS_TEXT):
                reading.kinds += ("marked_turn_not_learnt",)
        elif key in LABELS:
            if not is_label(value, name, path):
                reading.unread += (path,)
        elif value and key not in TOOLS:
            raise refused_key(name, path, *REFUSED_IN_TURNS[key])
        elif value and role != "system":
            raise refused_key(name, path, "invalid_tools", f"is in a turn of {role}; declare tools beside the turns")
        elif value:
            reading.tools += ((path, read_declarations(value, name)),)
    return one_weight(weights, "") if weights else 1.0


def _is_known(key: str) -> bool:
    return key in FLAGS or key in WEIGHTS or key in LABELS or key in TOOLS or key in REFUSED_IN_TURNS


@functools.lru_cache(maxsize=256)  # the turns of a file have few different sets of keys
def _turn_keys(present: tuple[str, ...], role_key: str, content_key: str) -> tuple[list[str], list[str]]:
    """Keys of a turn that nothing reads, and those that a value decides about."""
    rest = [key for key in present if key not in (role_key, content_key, "tool_calls", "function_call", *EXTRA_KEYS)]
    known = [key for key in rest if _is_known(key)]
    return [key for key in rest if key not in known], known

"""Turns of chat records: roles, content, order, and which assistant turns are trained on."""

from collections.abc import Mapping

from .conversation import EXTRA_KEYS, Conversation, RecordError, ToolCall, Turn
from .json_values import require_text
from .tool_calls import calls_of_text, calls_of_turn, read_tools

# roles that may follow a role; "tool call" is an assistant turn that calls a tool
_FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool call": ("tool",),
    "tool": ("tool", "assistant"),
}
# the role of a turn whose content is calls as JSON text
_CALLS_AS_TEXT = "function_call"


def read_system(record: Mapping[str, object]) -> list[Turn]:
    """Read the system text beside the turns as one turn; no turn if it is absent or empty.

    Raises:
        RecordError: it is not text.
    """
    system = record.get("system")
    return [Turn("system", require_text(system, "system"))] if system not in (None, "") else []


def read_chat(
    record: Mapping[str, object], key: str, role_names: Mapping[str, str], sharegpt: bool = False
) -> Conversation:
    """Read a list of turns.

    The order must be: at most one system turn at the beginning, then user and assistant by turns. An assistant turn
    that calls tools is followed by tool turns, then by the assistant again. The last turn may be a user's.

    Args:
        record: the whole record, which may also have ``system`` and ``tools``.
        key: of the list.
        role_names: the format's names of roles → :data:`~.conversation.ROLES`, or "function_call".
        sharegpt: turns may have ``from`` and ``value`` instead of ``role`` and ``content``.

    Raises:
        RecordError: a turn cannot be read, turns are in another order, or no assistant turn is trained on.
    """
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise RecordError("wrong_type", f"{key} must be a list of turns with at least one turn")
    read = read_system(record)
    before = "system" if read else ""
    assistant = learns = False
    for index, turn in enumerate(turns):
        try:
            read.append(_turn(turn, role_names, sharegpt))
        except RecordError as error:
            raise RecordError(error.reason, f"{key}[{index}]{error}") from None
        role = read[-1].role
        if role not in _FOLLOWERS[before]:
            raise RecordError(
                "broken_alternation",
                f"{key}[{index}] is a turn of {role} after {before or 'nothing'}; expected "
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
        raise RecordError("no_learned_turn", f"{key} has train: false or weight: 0 in every assistant turn")
    return Conversation(tuple(read), tools=read_tools(record) if "tools" in record else ())


def _turn(turn: object, role_names: Mapping[str, str], sharegpt: bool) -> Turn:
    """Read one turn; error messages begin where the turn's position in the record ends."""
    if not isinstance(turn, dict):
        raise RecordError("wrong_type", f" must be an object with role and content, not {type(turn).__name__}")
    role_key, content_key = ("from", "value") if sharegpt and "from" in turn else ("role", "content")
    role = _role(turn, role_key, role_names)
    content = turn.get(content_key)
    if len(turn) == 2 and type(content) is str and content.isascii() and role != _CALLS_AS_TEXT:
        return Turn(role, content)  # fast path for most turns
    calls: tuple[ToolCall, ...] = calls_of_turn(turn)
    if role == _CALLS_AS_TEXT:
        role, text, calls = "assistant", "", calls_of_text(content, f".{content_key}")
    elif calls and role != "assistant":
        raise RecordError("wrong_type", f".tool_calls is in a turn of {role}; only an assistant calls tools")
    elif calls and content is None:
        text = ""
    elif isinstance(content, list):
        text = _concatenated(content, f".{content_key}")
    elif content_key not in turn:
        raise RecordError("wrong_type", f" must be an object with role and content, it has no {content_key}")
    else:
        text = require_text(content, f".{content_key}")
    extra = {key: require_text(turn[key], f".{key}") for key in EXTRA_KEYS if turn.get(key) is not None}
    return Turn(role, text, _learned(turn), calls, extra)


def _role(turn: Mapping[str, object], role_key: str, role_names: Mapping[str, str]) -> str:
    name = turn.get(role_key)
    if isinstance(name, str) and name in role_names:
        return role_names[name]
    if role_key not in turn:
        raise RecordError("wrong_type", f" must be an object with role and content, it has no {role_key}")
    shown = repr(name[:40]) if isinstance(name, str) else type(name).__name__
    raise RecordError("unknown_role", f" has the unknown role {shown}; known: {', '.join(role_names)}")


def _concatenated(parts: list[object], name: str) -> str:
    """Read OpenAI's content as a list of parts; only text can be trained on."""
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str) or (kind == "text" and "text" not in part):
            raise RecordError("wrong_type", f'{name} is a list whose item {index} is no {{"type": "text", "text": …}}')
        if kind != "text":
            raise RecordError("unsupported_content", f"{name}[{index}] is of type {kind[:40]!r}; only text can be read")
        texts.append(require_text(part["text"], f"{name}[{index}].text"))
    return "".join(texts)


def _learned(turn: Mapping[str, object]) -> bool:
    """Whether neither ``train`` nor ``weight`` excludes the turn from training."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RecordError("wrong_type", f".train must be true or false, not {type(train).__name__}")
    if weight is not None and not isinstance(weight, (int, float)):
        raise RecordError("wrong_type", f".weight must be 0 or 1, not {type(weight).__name__}")
    if weight not in (None, 0, 1):
        raise RecordError(
            "unsupported_weight", ".weight must be 0 or 1: a token is supervised or not; only tasks have weights"
        )
    return train is not False and weight != 0

"""Tool calls and tool declarations in chat records, as OpenAI's API and ShareGPT write them."""

from collections.abc import Mapping

from .conversation import RecordError, ToolCall
from .json_values import parse_json, require_json, require_text
from .known_keys import TOOLS
from .reading import Reading

_TOOLS = frozenset(TOOLS)
# keys of a call, and of the function inside it
_CALL_KEYS, _FUNCTION_KEYS = frozenset({"id", "type", "function"}), frozenset({"name", "arguments"})


def calls_of_turn(turn: Mapping[str, object], turns: str, reading: Reading) -> tuple[ToolCall, ...]:
    """Read the calls of a turn from ``tool_calls``, or from ``function_call``, its predecessor for a single call.

    Args:
        turn: one.
        turns: path of turns, such as ``messages[]``.
        reading: that keys of calls are added to which nothing reads.

    Raises:
        RecordError: a call without a name, or with arguments that are no JSON object, or both keys have calls.
    """
    calls, single = turn.get("tool_calls"), turn.get("function_call")
    if single is not None:
        if calls:
            raise RecordError("invalid_tool_call", " has both tool_calls and function_call; keep one")
        return (_call(single, ".function_call", f"{turns}.function_call", reading),)
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise RecordError("wrong_type", f".tool_calls must be a list, not {type(calls).__name__}")
    path = f"{turns}.tool_calls[]"
    return tuple(_call(call, f".tool_calls[{index}]", path, reading) for index, call in enumerate(calls))


def calls_of_text(content: object, name: str, turns: str, reading: Reading) -> tuple[ToolCall, ...]:
    """Read one call or a list of calls from JSON text, the content of a ``function_call`` turn in ShareGPT.

    Args:
        content: of the turn.
        name: its position in the turn, for the error message.
        turns, reading: as in :func:`calls_of_turn`.

    Raises:
        RecordError: it is not text, not JSON, or not a call.
    """
    value = parse_json(require_text(content, name), name, "invalid_tool_call")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RecordError("invalid_tool_call", f"{name} is an empty list, not a call")
    return tuple(_call(call, name, f"{turns}{name}", reading) for call in calls)


def _call(call: object, name: str, path: str, reading: Reading) -> ToolCall:
    """Read one call; OpenAI has name and arguments under ``function``, others at the top."""
    if not isinstance(call, dict):
        raise RecordError("invalid_tool_call", f"{name} must be an object with name and arguments")
    if call.get("type") not in (None, "function"):
        raise RecordError("invalid_tool_call", f"{name} is a call of a type other than function")
    nested = isinstance(call.get("function"), dict)
    function = call["function"] if nested else call
    function_name, arguments = function.get("name"), function.get("arguments")
    known = _CALL_KEYS if nested else _CALL_KEYS | _FUNCTION_KEYS
    reading.unread += tuple(f"{path}.{key}" for key in call if key not in known and call[key] is not None)
    if nested:
        keys = [key for key in function if key not in _FUNCTION_KEYS and function[key] is not None]
        reading.unread += tuple(f"{path}.function.{key}" for key in keys)
    if not isinstance(function_name, str) or not function_name:
        raise RecordError("invalid_tool_call", f"{name} has no name of a function")
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{name}.arguments", "invalid_tool_call") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RecordError("invalid_tool_call", f"{name}.arguments must be an object, not {type(arguments).__name__}")
    require_json(arguments, f"{name}.arguments")
    read = ToolCall(name=require_text(function_name, f"{name}.name"), arguments=arguments)
    if call.get("id") is not None:
        read["id"] = require_text(call["id"], f"{name}.id")
    return read


def read_tools(record: Mapping[str, object], reading: Reading) -> tuple[Mapping[str, object], ...]:
    """Read the declarations of a record: ``tools`` or ``functions`` beside its turns, or in one of them.

    Args:
        record: one.
        reading: findings in it, with the declarations of its turns.

    Raises:
        RecordError: they are something else, or differ from one place to another.
    """
    if _TOOLS.isdisjoint(record) and not reading.tools:
        return ()
    beside = [(key, read_declarations(record[key], key)) for key in TOOLS if record.get(key)]
    declared = [(name, tools) for name, tools in (*beside, *reading.tools) if tools]
    for name, tools in declared[1:]:
        if tools != declared[0][1]:
            raise RecordError("invalid_tools", f"{declared[0][0]} and {name} declare different tools; keep one of them")
    return declared[0][1] if declared else ()


def read_declarations(tools: object, name: str) -> tuple[Mapping[str, object], ...]:
    """Read declarations of tools: a list, or a list as JSON text.

    A declaration without ``function`` is written as servers send it, ``{"type": "function", "function": …}``.

    Args:
        tools: from the record.
        name: position in the record, for the error message.

    Raises:
        RecordError: they are something else.
    """
    if isinstance(tools, str):
        tools = parse_json(tools, name, "invalid_tools") if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("invalid_tools", f"{name} must be a list of objects, or such a list as JSON text")
    require_json(tools, name)
    return tuple(map(_as_sent, tools))


def _as_sent(tool: dict[str, object]) -> Mapping[str, object]:
    """Return a declaration as a server's request has it; one that is no bare function stays unchanged."""
    if "function" in tool or not isinstance(tool.get("name"), str) or tool.get("type", "function") != "function":
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}

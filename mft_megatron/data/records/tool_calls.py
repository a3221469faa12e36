"""Tool calls and tool declarations in chat records, as OpenAI's API and ShareGPT write them."""

from collections.abc import Mapping

from .conversation import RecordError, ToolCall
from .json_values import parse_json, require_json, require_text


def calls_of_turn(turn: Mapping[str, object]) -> tuple[ToolCall, ...]:
    """Read the calls of a turn from ``tool_calls``, or from ``function_call``, its predecessor for a single call.

    Raises:
        RecordError: a call without a name, or with arguments that are no JSON object.
    """
    calls = turn.get("tool_calls")
    if calls is None:
        single = turn.get("function_call")
        return () if single is None else (_call(single, ".function_call"),)
    if not isinstance(calls, list):
        raise RecordError("wrong_type", f".tool_calls must be a list, not {type(calls).__name__}")
    return tuple(_call(call, f".tool_calls[{index}]") for index, call in enumerate(calls))


def calls_of_text(content: object, name: str) -> tuple[ToolCall, ...]:
    """Read one call or a list of calls from JSON text, the content of a ``function_call`` turn in ShareGPT.

    Args:
        content: of the turn.
        name: its position in the record, for the error message.

    Raises:
        RecordError: it is not text, not JSON, or not a call.
    """
    value = parse_json(require_text(content, name), name, "invalid_tool_call")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RecordError("invalid_tool_call", f"{name} is an empty list, not a call")
    return tuple(_call(call, name) for call in calls)


def _call(call: object, name: str) -> ToolCall:
    """Read one call; OpenAI has name and arguments under ``function``, others at the top."""
    if not isinstance(call, dict):
        raise RecordError("invalid_tool_call", f"{name} must be an object with name and arguments")
    if call.get("type") not in (None, "function"):
        raise RecordError("invalid_tool_call", f"{name} is a call of a type other than function")
    function = call["function"] if isinstance(call.get("function"), dict) else call
    function_name, arguments = function.get("name"), function.get("arguments")
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


def read_tools(record: Mapping[str, object]) -> tuple[Mapping[str, object], ...]:
    """Read the ``tools`` that a record declares: a list of objects, or the same as JSON text.

    Raises:
        RecordError: they are something else.
    """
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, "tools", "invalid_tools") if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("invalid_tools", "tools must be a list of objects, or such a list as JSON text")
    require_json(tools, "tools")
    return tuple(tools)

"""Messages that templates get, and changes of the strings in them."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mft_megatron.data.records.conversation import Turn
from mft_megatron.data.records.segments import REASONING

from .jinja_renderer import Message

# strings of a message that are not content, but tell a template how the message is built
_STRUCTURE = frozenset({"content", *REASONING, "tool_calls", "type", "function", "name", "arguments"})


def message_of(turn: Turn, text_arguments: bool = False, no_content: bool = False) -> Message:
    """Write a turn as in OpenAI's API, with its reasoning under each of the keys that templates read.

    Args:
        turn: to write.
        text_arguments: arguments of tool calls are JSON text, as in OpenAI's API, instead of the object that most
            templates and servers expect.
        no_content: the content is ``None`` where there is nothing beside a tool call.
    """
    message: Message = {"role": turn.role, "content": turn.content, **turn.extra}
    reasoning = next((turn.extra[name] for name in REASONING if turn.extra.get(name) is not None), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if turn.tool_calls:
        message["tool_calls"] = [
            {
                **({"id": call["id"]} if "id" in call else {}),
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": json.dumps(call["arguments"], ensure_ascii=False)
                    if text_arguments
                    else call["arguments"],
                },
            }
            for call in turn.tool_calls
        ]
        if no_content and not turn.content:
            message["content"] = None
    return message


def strings_in(value: object) -> Iterator[str]:
    """Iterate over every string in nested lists and dicts, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Apply a function to every string in nested lists and dicts, including keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value


def replace_content(value: Any, other: str) -> Any:
    """Replace every string in nested lists and dicts by another one, except names that tell how a message is built."""
    return map_strings(value, lambda text: text if text in _STRUCTURE or not text else other)


def break_names(value: Any, pattern: re.Pattern[str], guard: str) -> Any:
    """Write ``guard`` between the characters of each name in the strings of a value, including overlapping names."""

    def broken(text: str) -> str:
        while pattern.search(text):
            text = pattern.sub(lambda match: guard.join(match.group()), text)
        return text

    return map_strings(value, broken)


def unused_characters(text: str) -> Iterator[str]:
    """Iterate over private-use characters that a text holds neither directly nor as a JSON escape in ASCII."""
    return (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text and f"\\u{code:04x}" not in text)

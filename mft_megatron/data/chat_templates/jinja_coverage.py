"""Checking that a template writes everything in a record.

Many templates ignore a system turn, tools, tool calls or tool answers that they were not made for. So each of these is
replaced by a placeholder, a word that no record contains, and every placeholder must be in the rendered text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .jinja_messages import replace_content
from .jinja_renderer import Message, Renderer, TemplateError


class Unwritten(NamedTuple):
    """A part of a record that the template does not write.

    Attributes:
        reason: name that the record is counted under.
        part: description of the part.
    """

    reason: str
    part: str


def unwritten_part(
    renderer: Renderer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    variables: Mapping[str, str],
    unused: str,
) -> Unwritten | None:
    """Find the first part of a conversation that a template does not write.

    Args:
        renderer: of the template.
        messages: of the conversation.
        tools: that it declares.
        variables: of the template.
        unused: a character that is neither in the conversation nor in the template.

    Returns:
        the part; ``None`` if everything is written, or if the template refuses the placeholders, because then it reads
        them.
    """
    placeholders = _Placeholders(unused)
    replaced = [placeholders.in_message(index, message) for index, message in enumerate(messages)]
    replaced_tools = [placeholders.in_tool(index, tool) for index, tool in enumerate(tools) if tool]
    if not placeholders.parts:
        return None
    try:
        text = renderer.render(replaced, replaced_tools or None, variables)
    except TemplateError:
        return None
    return next((part for word, part in placeholders.parts.items() if not placeholders.is_written(word, text)), None)


class _Placeholders:
    """Placeholders, and the part of the record that each of them replaces (``parts``)."""

    def __init__(self, unused: str):
        self._unused = unused
        self.parts: dict[str, Unwritten] = {}

    def is_written(self, word: str, text: str) -> bool:
        """Whether a placeholder is in a text, directly or as a JSON escape in ASCII."""
        return word in text or word.replace(self._unused, f"\\u{ord(self._unused):04x}") in text

    def _add(self, reason: str, part: str) -> str:
        word = f"{self._unused}{len(self.parts)}{self._unused}"
        self.parts[word] = Unwritten(reason, part)
        return word

    def in_message(self, index: int, message: Message) -> Message:
        """Replace the content of a system or tool turn, content beside a tool call, and tool calls."""
        role, calls = message["role"], message.get("tool_calls")
        replaced = dict(message)
        if (message["content"] or "").strip():
            if role == "system":
                replaced["content"] = self._add("system_has_no_place", "the system turn")
            elif role == "tool":
                replaced["content"] = self._add("tools_have_no_place", f"the tool's answer in turn {index}")
            elif calls:
                replaced["content"] = self._add(
                    "content_has_no_place", f"the content of turn {index} beside its tool call"
                )
        if calls:
            replaced["tool_calls"] = [self._in_call(index, call) for call in calls]
        return replaced

    def _in_call(self, index: int, call: Mapping[str, Any]) -> Mapping[str, Any]:
        part = f"the tool call of turn {index}"
        function = {"name": self._add("tools_have_no_place", part), "arguments": call["function"]["arguments"]}
        as_text = isinstance(function["arguments"], str)
        arguments = json.loads(function["arguments"]) if as_text else function["arguments"]
        if arguments:
            word = self._add("tools_have_no_place", f"the arguments of {part}")
            arguments = dict.fromkeys(arguments, word)
            function["arguments"] = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
        return {**call, "function": function}

    def in_tool(self, index: int, tool: Mapping[str, Any]) -> Mapping[str, Any]:
        """Replace the name of a tool; if it has none, all of its content."""
        word = self._add("tools_have_no_place", f"tool {index} of the record")
        function = tool.get("function")
        if isinstance(function, Mapping) and "name" in function:
            return {**tool, "function": {**function, "name": word}}
        if "name" in tool:
            return {**tool, "name": word}
        return replace_content(tool, word)

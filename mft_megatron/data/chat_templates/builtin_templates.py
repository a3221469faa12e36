"""The built-in chat formats as Jinja text for servers: each writes what its function in :mod:`.builtin_formats` writes.

The texts depend on no option of the Jinja environment: all output is in expressions, and no filter is used but
``tojson``, which servers define as plain JSON.
"""

import json
from collections.abc import Mapping


def chatml_template(openings: Mapping[str, str], stop: str, tools: tuple[str, str]) -> str:
    """Write the template of ChatML.

    Args:
        openings: text that opens a turn, by role.
        stop: name of the token that ends each turn.
        tools: text before and after the list of tools in the system turn.
    """
    # answers of tools that follow each other share a turn
    turn = """\
    {%- if message.role == "tool" %}
        {{- "\\n" if loop.index0 and messages[loop.index0 - 1].role == "tool" else openings.tool }}
        {{- "<tool_response>\\n" + content + "\\n</tool_response>" }}
        {{- "" if not loop.last and messages[loop.index0 + 1].role == "tool" else stop + "\\n" }}
    {%- else %}
        {{- openings[message.role] + content }}
@CALLS
        {{- stop + "\\n" }}
    {%- endif %}"""
    return _template(openings, stop, stop + "\n", tools, turn)


def mftcoder_template(openings: Mapping[str, str], stop: str, tools: tuple[str, str]) -> str:
    """Write the template of MFTCoder's role markers; arguments are those of :func:`chatml_template`."""
    turn = """\
    {%- if message.role == "assistant" %}
        {{- openings.assistant + content }}
@CALLS
        {{- stop + "\\n" }}
    {%- else %}
        {{- openings[message.role] + content + "\\n" }}
    {%- endif %}"""
    return _template(openings, stop, "\n", tools, turn)


_CALLS = """\
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- set arguments = function.arguments or {} %}
            {{- ("\\n" if content or not loop.first else "") + "<tool_call>\\n{\\"name\\": " + function.name | tojson }}
            {{- ", \\"arguments\\": " + (arguments if arguments is string else arguments | tojson) }}
            {{- "}\\n</tool_call>" }}
        {%- endfor %}"""

_TEMPLATE = """\
{%- set openings = @OPENINGS %}
{%- set stop = @STOP %}
{%- set listed = namespace(tools="") %}
{%- if tools %}
    {%- set listed.tools = @BEFORE %}
    {%- for tool in tools %}
        {%- set listed.tools = listed.tools + ("" if loop.first else "\\n") + tool | tojson %}
    {%- endfor %}
    {%- set listed.tools = listed.tools + @AFTER %}
    {{- "" if messages[0].role == "system" else openings.system + listed.tools + @END }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in openings %}
        {{- raise_exception("no turn of " + message.role + "; roles are system, user, assistant and tool") }}
    {%- endif %}
    {%- set content = message.content or "" %}
    {%- if tools and loop.first and message.role == "system" %}
        {%- set content = content + "\\n\\n" + listed.tools %}
    {%- endif %}
@TURN
{%- endfor %}
{{- openings.assistant if add_generation_prompt else "" }}
"""


def _template(openings: Mapping[str, str], stop: str, end: str, tools: tuple[str, str], turn: str) -> str:
    """Fill in the text that both formats have in common; ``end`` is the end of a system turn."""
    before, after = tools
    parts = {
        # a place may be in the text of another, so the order matters: texts of the user come last
        "@TURN": turn,
        "@CALLS": _CALLS,
        "@BEFORE": _quoted(before),
        "@AFTER": _quoted(after),
        "@END": _quoted(end),
        "@STOP": _quoted(stop),
        "@OPENINGS": "{" + ", ".join(f'"{role}": {_quoted(text)}' for role, text in openings.items()) + "}",
    }
    text = _TEMPLATE
    for place, part in parts.items():
        text = text.replace(place, part, 1)
    return text


def _quoted(text: str) -> str:
    """Write a text as a string literal, which Jinja reads like Python: its escapes are those of JSON, and only these
    are escaped, as JSON's pairs of surrogates are no character to Jinja."""
    return json.dumps(text, ensure_ascii=False)

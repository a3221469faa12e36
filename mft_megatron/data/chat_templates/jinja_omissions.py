"""Counting what a template leaves out of the answers: whitespace around them, and reasoning.

A server's template leaves the same out, so that this is no fault of a record. But an answer that begins with the spaces
of a line of code, or with reasoning, is not trained as it is in the record, and the user should know.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mft_megatron.data.records.conversation import Turn
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.records.segments import REASONING

from .jinja_renderer import Message, Renderer, TemplateError

# reasoning within the content, which may begin in the prompt
_REASONING = re.compile(r"\A(\s*<think>)?(.*)</think>", re.DOTALL)


def count_changed_answers(notes: RecordNotes, turns: Sequence[Turn], written: Sequence[str]) -> None:
    """Count supervised answers that are not written as they are in the record, by how they differ.

    Args:
        notes: counts to add to.
        turns: supervised ones.
        written: text of the sample for each turn, or one text for all where they cannot be told apart.
    """
    texts = written if len(written) == len(turns) else ["\0".join(written)] * len(turns)
    for turn, text in zip(turns, texts, strict=True):
        if turn.content not in text:
            answer = turn.content
            if (reasoning := _REASONING.match(answer)) is not None:
                answer = answer[reasoning.end() :].lstrip("\n")  # templates write their own line breaks after the tag
            for kind in _changes(answer, text):
                notes.kinds[kind] += 1


def _changes(answer: str, text: str) -> list[str]:
    """Kinds of changes of an answer, which may be absent from ``text``."""
    core = answer.strip()
    if answer in text:
        return []
    if core not in text:
        return ["answers_changed"]
    start = answer.find(core)
    leading, trailing = answer[: start + len(core)], answer[start:]
    return [
        *(["leading_whitespace"] if leading not in text else []),
        *(["trailing_whitespace"] if trailing not in text else []),
    ]


def count_omitted_reasoning(
    notes: RecordNotes,
    renderer: Renderer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, str],
    unused: str,
) -> None:
    """Count the answers whose reasoning a template leaves out, in earlier rounds and in the last one.

    Each reasoning is replaced by a word that no record contains; these words must be in the rendered text.

    Args:
        notes: counts to add to.
        renderer: of the template.
        messages: of the conversation.
        tools: that it declares.
        variables: of the template.
        unused: a character that is neither in the conversation nor in the template.
    """
    words: dict[int, str] = {}
    replaced = list(messages)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            word = f"{unused}{index}{unused}"
            other = _with_reasoning(message, word)
            if other is not None:
                words[index], replaced[index] = word, other
    if not words:
        return
    try:
        text = renderer.render(replaced, tools, variables)
    except TemplateError:  # it reads them
        return
    last_question = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=0)
    for index, word in words.items():
        if word not in text:
            notes.kinds["earlier_reasoning" if index < last_question else "last_reasoning"] += 1


def _with_reasoning(message: Message, word: str) -> Message | None:
    """Replace the reasoning of a message by a word; ``None`` if it has none."""
    replaced = {**message, **{key: word for key in REASONING if message.get(key)}}
    content = message["content"]
    if content and "</think>" in content and (match := _REASONING.match(content)) is not None and match[2].strip():
        replaced["content"] = f"{match[1] or ''}\n{word}\n</think>{content[match.end() :]}"
    return None if replaced == message else replaced

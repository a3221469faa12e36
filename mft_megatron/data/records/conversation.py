"""Conversations, the one form that records of all formats are read into."""

import dataclasses
from collections.abc import Mapping
from typing import TypedDict

ROLES = ("system", "user", "assistant", "tool")
# keys of a turn, besides role and content, that chat templates read; all are text
EXTRA_KEYS = ("reasoning_content", "reasoning", "thinking", "name", "tool_call_id")


class RecordError(ValueError):
    """A record that cannot be used; the message is one line.

    Attributes:
        reason: name that such records are counted under in the ledger.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class _NamedCall(TypedDict):
    name: str
    arguments: dict[str, object]


class ToolCall(_NamedCall, total=False):
    """One call of a tool; ``id`` only where the record has one."""

    id: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: one of :data:`ROLES`, or "prompt" or "completion" in raw text.
        content: the text.
        learn: False for an assistant turn that the record excludes from training.
        tool_calls: calls in an assistant turn.
        extra: those of :data:`EXTRA_KEYS` that the turn has.
        weight: of its tokens in the loss where it is learnt, above 0.
    """

    role: str
    content: str
    learn: bool = True
    tool_calls: tuple[ToolCall, ...] = ()
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The turns of a sample.

    Attributes:
        turns: in their order.
        raw: turns are concatenated as they are, without a chat format.
        document: a ``text`` record, in which every token is supervised.
        tools: functions that the record declares, unchanged.
        weight: of the sample in the loss, above 0.
    """

    turns: tuple[Turn, ...]
    raw: bool = False
    document: bool = False
    tools: tuple[Mapping[str, object], ...] = ()
    weight: float = 1.0

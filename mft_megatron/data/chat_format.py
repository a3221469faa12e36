"""A conversation becomes segments of text, each supervised or not.

Segments are tokenised one by one, so that the loss mask is exact by construction: no token straddles a border. Every
assistant turn and the token that ends it are supervised, nothing else. :data:`FORMATS` names the formats; a new one is
a function and a line.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping

from mft_megatron.data.conversation import Conversation
from mft_megatron.errors import InputError


@dataclasses.dataclass(frozen=True)
class Segment:
    """``special``: the text is the name of one token of the vocabulary, not text to be cut.

    ``markup``: names of special tokens in the text stand for those tokens; elsewhere they are text like any other, so
    that what a turn says can never end the turn.
    """

    text: str
    supervised: bool
    special: bool = False
    markup: bool = False


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How turns are written down. ``markers``: what opens the turn of each role. ``end_of_text``: the tokenizer's."""

    name: str
    markers: Mapping[str, str]
    end_of_text: str

    @property
    def stop_token(self) -> str:
        """The token that ends an assistant's turn."""
        return STOP_TOKENS.get(self.name, self.end_of_text)

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The whole sample in order."""
        if conversation.raw:
            return list(_raw(conversation, self))
        return list(FORMATS[self.name](conversation, self))

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides how a conversation is written."""
        content = json.dumps([self.name, dict(self.markers), self.end_of_text], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def _raw(conversation: Conversation, style: ChatFormat) -> Iterator[Segment]:
    for turn in conversation.turns:
        yield Segment(turn.content, turn.role == "completion", markup=True)
    yield Segment(style.end_of_text, True, special=True)


def _chatml(conversation: Conversation, style: ChatFormat) -> Iterator[Segment]:
    """``<|im_start|>role\\ncontent<|im_end|>\\n``"""
    for turn in conversation.turns:
        learn = turn.role == "assistant"
        yield Segment("<|im_start|>", False, special=True)
        yield Segment(f"{style.markers[turn.role]}\n", False)
        yield Segment(turn.content, learn)
        yield Segment(style.stop_token, learn, special=True)
        yield Segment("\n", False)


def _mftcoder(conversation: Conversation, style: ChatFormat) -> Iterator[Segment]:
    """``<s>system\\n…\\n<s>human\\n…\\n<s>bot\\n…`` and the end-of-text token after each answer."""
    for turn in conversation.turns:
        learn = turn.role == "assistant"
        yield from _marker(style.markers[turn.role])
        yield Segment(turn.content, learn)
        if learn:
            yield Segment(style.stop_token, True, special=True)
        yield Segment("\n", False)


def _marker(text: str) -> Iterator[Segment]:
    """A role marker: its ``<s>``, where it begins with one, is one token where the vocabulary has it."""
    if text.startswith("<s>"):
        yield Segment("<s>", False, special=True)
        text = text[len("<s>") :]
    if text:
        yield Segment(text, False)


FORMATS: dict[str, Callable[[Conversation, ChatFormat], Iterator[Segment]]] = {
    "chatml": _chatml,
    "mftcoder": _mftcoder,
}
STOP_TOKENS = {"chatml": "<|im_end|>"}  # where it is not the end-of-text token
MARKERS = {
    "chatml": {"system": "system", "user": "user", "assistant": "assistant"},
    "mftcoder": {"system": "<s>system\n", "user": "<s>human\n", "assistant": "<s>bot\n"},
}


def chat_format(name: str, end_of_text: str, role_markers: str | None = None) -> ChatFormat:
    """The format of ``--chat-template`` with the markers of ``--role-markers``.

    Args:
        name: a key of :data:`FORMATS`.
        end_of_text: the tokenizer's end-of-text token.
        role_markers: JSON object of markers by role; the roles may be called user and assistant, or as in MFTCoder
            human and bot. Roles not named keep the format's marker.

    Raises:
        InputError: no JSON object of strings, or an unknown role.
    """
    markers = dict(MARKERS[name])
    if role_markers is not None:
        try:
            given = json.loads(role_markers)
        except ValueError as error:
            raise InputError(f"--role-markers {role_markers}: not JSON ({error})") from None
        if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
            raise InputError(f"--role-markers {role_markers}: give a JSON object of strings, one a role")
        for role, text in given.items():
            role = {"human": "user", "bot": "assistant"}.get(role, role)
            if role not in markers:
                raise InputError(f"--role-markers: unknown role {role!r}; known: {', '.join(markers)}, human, bot")
            markers[role] = text
    return ChatFormat(name, markers, end_of_text)

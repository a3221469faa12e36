"""Chat formats, which write a conversation as text, and the choice of one.

Every assistant turn and the token that ends it are supervised, nothing else. Built-in formats are in
:mod:`.builtin_formats`, Jinja templates in :mod:`.jinja_format`.
"""

import json
from pathlib import Path
from typing import Protocol

from mft_megatron.data.records.conversation import Conversation
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.records.segments import SUPERVISE, Segment
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .builtin_formats import FORMATS, BuiltInFormat, special_in_markers
from .format_names import TOKENIZERS_TEMPLATE


class ChatFormat(Protocol):
    """A way to write conversations: :class:`.BuiltInFormat` or :class:`.TemplateFormat`."""

    @property
    def name(self) -> str:
        """Name that messages show."""

    @property
    def stop_token(self) -> str:
        """Name of the token that ends an assistant's turn."""

    @property
    def source(self) -> str:
        """Text of the Jinja template that writes conversations so."""

    @property
    def supervise(self) -> str:
        """Turns that are supervised, of :data:`~mft_megatron.data.records.segments.SUPERVISE`."""

    @property
    def learn_empty_answers(self) -> bool:
        """Whether empty answers are supervised, too."""

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides how a conversation is written."""

    def segments(self, conversation: Conversation, notes: RecordNotes | None = None) -> list[Segment]:
        """Write a conversation as segments of the whole sample, in order.

        Args:
            conversation: one.
            notes: counts that text which is left out is added to; ``None`` where nobody reads them.

        Raises:
            RecordError: nothing in it is supervised, or a part of it cannot be written.
        """

    def prompt(self, conversation: Conversation, index: int) -> str:
        """Write the prompt with which a server asks for turn ``index`` of a chat.

        Raises:
            RecordError: a part of it cannot be written.
        """


def chat_format(
    name: str,
    tokenizer: Tokenizer,
    role_markers: str | None = None,
    supervise: str = "all",
    learn_empty_answers: bool = False,
) -> ChatFormat:
    """Make the format of ``--chat-template`` with the markers of ``--role-markers``.

    Args:
        name: a key of :data:`.FORMATS`; the path of a ``.jinja`` file; or "auto": the tokenizer's template if it has
            one, else chatml if it has the tokens for it, else mftcoder. The result's ``name`` tells which it is.
        tokenizer: of the data set.
        role_markers: JSON object of markers by role; roles are named as here, or human and bot as in MFTCoder. Other
            roles keep the format's marker. Templates have no markers.
        supervise: one of :data:`~mft_megatron.data.records.segments.SUPERVISE`.
        learn_empty_answers: empty answers are supervised, too.

    Raises:
        InputError: an unknown name, a template that cannot be used, markers that are no JSON object of strings, or an
            unknown role.
    """
    if supervise not in SUPERVISE:
        raise InputError(f"--supervise {supervise}: give one of {', '.join(SUPERVISE)}")
    if name == "auto":
        name = _automatic(tokenizer)
    if name not in FORMATS:
        if role_markers is not None:
            raise InputError("--role-markers: a Jinja template has no role markers; leave them out, or use mftcoder")
        from .jinja_format import template_format  # jinja2 is needed for templates alone

        source, shown = _template(name, tokenizer), name.rsplit("/", 1)[-1]
        return template_format(source, shown, tokenizer, supervise, learn_empty_answers)
    markers = _markers(name, role_markers)
    special = special_in_markers(markers, tokenizer)
    return BuiltInFormat(name, markers, tokenizer.end_of_text, supervise, special, learn_empty_answers)


def _automatic(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is not None:
        return TOKENIZERS_TEMPLATE
    chatml_stop = FORMATS["chatml"].stop_token
    return "chatml" if chatml_stop is not None and tokenizer.token_id(chatml_stop) is not None else "mftcoder"


def _template(name: str, tokenizer: Tokenizer) -> str:
    if name == TOKENIZERS_TEMPLATE and tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if not name.endswith(".jinja"):
        raise InputError(f"--chat-template {name}: give auto, {', '.join(FORMATS)} or the path of a .jinja file")
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--chat-template {name}: {error.strerror}; give the path of a .jinja file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--chat-template {name}: not UTF-8 (byte {error.start})") from None


def _markers(name: str, role_markers: str | None) -> dict[str, str]:
    markers = dict(FORMATS[name].markers)
    if role_markers is None:
        return markers
    try:
        changed = json.loads(role_markers)
    except ValueError as error:
        raise InputError(f"--role-markers {role_markers}: not JSON ({error})") from None
    if not isinstance(changed, dict) or not all(isinstance(text, str) for text in changed.values()):
        raise InputError(f"--role-markers {role_markers}: give a JSON object of strings, one a role")
    for role, text in changed.items():
        role = {"human": "user", "bot": "assistant"}.get(role, role)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"--role-markers: the marker of {role} holds half a surrogate pair; write the character")
        if role not in markers:
            raise InputError(f"--role-markers: unknown role {role!r}; known: {', '.join(markers)}, human, bot")
        markers[role] = text
    return markers

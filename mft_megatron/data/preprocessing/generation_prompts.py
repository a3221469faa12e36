"""Comparing what stands before trained answers with the prompt that a server gives a model.

A server renders the turns so far with ``add_generation_prompt`` and tokenises the text as a whole. Training has the
whole conversation, cut in segments. Both must have the same tokens before an answer; the first chats of each task show
whether they have: some of each shape, as tools, reasoning or more rounds are written differently.
"""

import collections
import functools
import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np

from mft_megatron.data.chat_templates.jinja_messages import message_of, strings_in
from mft_megatron.data.chat_templates.token_names import common_prefix, names_in, names_of_text, names_pattern
from mft_megatron.data.records.conversation import Conversation, RecordError
from mft_megatron.data.records.record_lines import parse_record
from mft_megatron.data.records.segments import REASONING, turn_weights
from mft_megatron.data.tasks.record_batches import RecordBatch, TokenizedBatch, position
from mft_megatron.data.tokenizers.tokenizer import Tokenizer

from .batched_texts import BatchedSamples, KnownTexts
from .encoding import TaskEncoding, read_conversations
from .prompt_spaces import with_prompt_spaces

LINES, CHATS = 512, 4  # of a task that are looked at, and chats of one shape among them
LONGEST = 1 << 16  # characters of a chat that is looked at: a prompt is short beside some records
_SHOWN = 32  # characters of a prompt in a note, before the difference and after it


class _Reference:
    """A tokenizer without its fast backend, which is compared with the first texts that are encoded for samples."""

    def __init__(self, tokenizer: Tokenizer):
        self.beginning = tokenizer.beginning
        self.token_id = tokenizer.token_id
        self.encode_arrays = tokenizer.encode_reference


class GenerationPrompts:
    """Compares the prompts of a task's first chats.

    Attributes:
        note: a line about the first difference; ``None`` where there is none.
    """

    def __init__(self, task: str, tokenizer: Tokenizer, encoding: TaskEncoding):
        """Prepare for a task.

        Args:
            task: its name.
            tokenizer: of the data set.
            encoding: of the task.
        """
        self.note: str | None = None
        self._task = task
        self._tokenizer = tokenizer
        self._encoding = encoding
        self._lines = 0
        self._chats: collections.Counter[tuple[bool, ...]] = collections.Counter()  # by shape

    def watch(self, batches: Iterable[RecordBatch | TokenizedBatch]) -> Iterator[RecordBatch | TokenizedBatch]:
        """Pass batches on, and look at the first chats in them."""
        for batch in batches:
            if isinstance(batch, RecordBatch) and self._lines < LINES:
                for number, line in itertools.islice(enumerate(batch.lines, batch.first_line), LINES - self._lines):
                    self._look_at(line, position(batch.path, number, batch.of_array))
                self._lines += len(batch.lines)
            yield batch

    def _look_at(self, line: object, where: str) -> None:
        if self.note is not None or (isinstance(line, bytes) and len(line) > LONGEST):
            return
        try:
            for conversation in read_conversations(parse_record(line), self._encoding):
                shape = _shape(conversation)
                if not conversation.raw and self._chats[shape] < CHATS and self._is_comparable(conversation):
                    self._chats[shape] += 1
                    self.note = self.note or self._difference(conversation, where)
        except RecordError:
            return  # which is counted, or ends the program, when the record is encoded

    def _is_comparable(self, conversation: Conversation) -> bool:
        """Whether a chat is short and no turn has the name of a token, which is that token in a server's prompt."""
        strings = list(strings_in([*map(message_of, conversation.turns), *conversation.tools]))
        return sum(map(len, strings)) <= LONGEST and not any(map(self._names.search, strings))

    @functools.cached_property
    def _names(self) -> re.Pattern[str]:
        return names_pattern(tuple(names_of_text(self._tokenizer)))

    def _difference(self, conversation: Conversation, where: str) -> str | None:
        style, tokenizer = self._encoding.style, self._tokenizer
        samples = BatchedSamples(KnownTexts(_Reference(tokenizer)))
        # answers begin where all of them is supervised
        segments = [segment._replace(context=False) for segment in style.segments(conversation)]
        samples.add(with_prompt_spaces(segments, tokenizer, self._encoding.add_bos))
        ids, mask, *_ = samples.arrays(tokenizer.bos_token_id if self._encoding.add_bos else None)
        starts = np.flatnonzero(np.diff(mask, prepend=np.uint8(0)) == 1).tolist()
        weights = turn_weights(conversation, style.supervise, learn_empty=style.learn_empty_answers)
        answers = [index for index, weight in enumerate(weights) if weight]
        bos = tokenizer.bos_token if self._encoding.add_bos else None
        for first, (start, answer) in enumerate(zip(starts, answers, strict=False)):
            try:
                prompt = style.prompt(conversation, answer)
            except RecordError as error:
                return f"task {self._task}: a server cannot write the prompt of turn {answer}: {error} ({where})"
            if bos is not None and not prompt.startswith(bos):  # the exported template writes it, too
                prompt = bos + prompt
            served = tokenizer.beginning.encode(prompt, markup=True)
            trained = ids[:start]
            if not np.array_equal(served, trained):
                note = self._describe(tokenizer.decode(served), tokenizer.decode(trained), first == 0)
                if note is not None:
                    return f"task {self._task}: {note} ({where})"
            if len(starts) != len(answers):  # a turn in several parts
                break
        return None

    def _describe(self, served: str, trained: str, first: bool) -> str | None:
        """Describe how two prompts differ, and what to do; ``None`` if only tokens of the history do."""
        # after an answer the same text may have other tokens, and tokens may absorb whitespace of the answer
        if not first and "".join(served.split()) == "".join(trained.split()):
            return None
        if served == trained:
            return f"a server's prompt has other tokens than trained ones for {served[-_SHOWN:]!r}"
        same = common_prefix(served, trained)
        if same < min(len(served), len(trained)):
            parts = (_cut(text, same - _SHOWN, same + _SHOWN) for text in (served, trained))
            return "a server's prompt has {}, trained prompts have {}; {}".format(*parts, _OTHERWISE)
        opening = max((name.start for name in names_in(served[:same], self._tokenizer.special_tokens)), default=0)
        ends = (_cut(text, max(opening, same - _SHOWN)) for text in (served, trained))
        remedy = _remedy(served[same:], trained[same:])
        return "a server's prompt ends in {}, trained answers begin after {}; {}".format(*ends, remedy)


def _shape(conversation: Conversation) -> tuple[bool, ...]:
    """Tell chats apart that templates write differently: by parts that they have."""
    roles = [turn.role for turn in conversation.turns]
    reasoning = any(key in turn.extra for turn in conversation.turns for key in REASONING)
    return "system" in roles, roles.count("user") > 1, "tool" in roles, bool(conversation.tools), reasoning


_OTHERWISE = (
    "give a --chat-template that writes the same with add_generation_prompt as before an answer, and "
    "--split-thinking-rounds where it writes reasoning of earlier rounds"
)


def _cut(text: str, start: int, end: int | None = None) -> str:
    """Quote a part of a text that begins at ``start``, which may be before the text."""
    shown = text[max(0, start) : end]
    return repr(shown if start <= 0 or shown.startswith("<") else f"…{shown}")


def _remedy(more: str, less: str) -> str:
    """Say what to do about text that only a server's prompt ends in (``more``), or only a trained one (``less``)."""
    if "think" in more:
        return (
            f"a model that thinks is given {more!r} before each answer: give answers their reasoning, with a template "
            "that writes it and --split-thinking-rounds where a record has several rounds, or serve without thinking"
        )
    if more:
        return "let trained answers begin with what follows it, or give a --chat-template without it"
    return (
        f"servers then ask the model to write {less!r}, which is not trained; give a --chat-template that writes it if "
        "add_generation_prompt is set"
    )

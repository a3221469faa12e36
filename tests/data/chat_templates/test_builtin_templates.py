"""The built-in formats as Jinja text: transformers writes and tokenises with it what packing stores."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft_megatron.data.chat_templates.formats import chat_format
from mft_megatron.data.chat_templates.jinja_messages import message_of
from mft_megatron.data.preprocessing.batched_texts import BatchedSamples, KnownTexts
from mft_megatron.data.records.conversation import Conversation, Turn
from mft_megatron.data.tokenizers.load import load_tokenizer
from tests.data.chat_templates.templates import ADDED, SPECIAL, save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
MARKERS = {
    "of another tool": {"system": "", "user": "### Question:\n", "assistant": "\n### Answer \"it\" \\ 'so':\n"},
    "of tokens": {"user": "<|user|>\u2028", "assistant": "<s>Bot 😀<|endoftext|>: ", "tool": "{{ t }}{% x %}@CALLS\t"},
    "chatml of Qwen": {"tool": "user"},
    "chatml of other roles": {"user": "human", "assistant": "bot <|assistant|>"},
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The tokenizer of packing and that of transformers; no token absorbs whitespace, as these formats know none."""
    from transformers import PreTrainedTokenizerFast

    folder = save_tokenizer(tmp_path_factory.mktemp("served"))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [{**token, "rstrip": False} for token in content["added_tokens"]]
    file.write_text(json.dumps(content))
    return load_tokenizer("HuggingFaceTokenizer", folder), PreTrainedTokenizerFast.from_pretrained(folder)


# names of special tokens are tokens to a server and text to packing
plain = st.text(max_size=5).filter(lambda drawn: not any(name in drawn for name in (*SPECIAL, *ADDED)))
text = plain | st.sampled_from(["", "\n", "\nif x:\n", " a", "    return 1\n", "é😀", '{"a": "b"}', "a\n\n"])
arguments = st.dictionaries(plain, st.integers() | text | st.lists(st.booleans(), max_size=2), max_size=2)
call = st.builds(lambda name, given: {"name": f"f{name}", "arguments": given}, plain, arguments)
tool = st.builds(lambda name: {"type": "function", "function": {"name": name, "parameters": {}}}, text)


@st.composite
def conversations(draw):
    """Any number of rounds, some of which call tools; the last is answered."""
    turns = [Turn("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn("user", draw(text)))
        if calls := draw(st.lists(call, max_size=2)):
            turns.append(Turn("assistant", draw(text), tool_calls=tuple(calls)))
            turns += [Turn("tool", draw(text)) for _ in range(draw(st.integers(1, 3)))]
        turns.append(Turn("assistant", draw(text) + "A"))
    return Conversation(tuple(turns), tools=tuple(draw(st.lists(tool, max_size=2))))


def _packed(style, tokenizer, conversation):
    samples = BatchedSamples(KnownTexts(tokenizer))
    samples.add(style.segments(conversation))
    ids, mask, *_ = samples.arrays(None)
    return ids.tolist(), mask


@pytest.mark.parametrize(
    ("name", "markers"),
    [
        *(("chatml", None), ("mftcoder", None), ("mftcoder", "of another tool"), ("mftcoder", "of tokens")),
        *(("chatml", "chatml of Qwen"), ("chatml", "chatml of other roles")),
    ],
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=conversations())
def test_a_server_sends_the_ids_that_are_packed(opened, name, markers, conversation):
    tokenizer, theirs = opened
    marked = None if markers is None else json.dumps(MARKERS[markers])
    style = chat_format(name, tokenizer, marked, supervise="last")  # so that all before the last answer is a prompt
    messages, tools = [message_of(turn) for turn in conversation.turns], list(conversation.tools) or None

    def render(messages, prompt):
        options = {"chat_template": style.source, "tools": tools, "add_generation_prompt": prompt, "tokenize": False}
        return theirs.apply_chat_template(messages, **options)

    def served(messages, prompt):
        return theirs(render(messages, prompt), add_special_tokens=False)["input_ids"]

    ids, mask = _packed(style, tokenizer, conversation)
    assert ids[: int(np.argmax(mask))] == served(messages[:-1], True)
    # the answer begins a text of its own, so that its ids may be others where all is tokenised at once
    assert "".join(segment.text for segment in style.segments(conversation)) == render(messages, False)

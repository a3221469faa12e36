"""Chat formats against texts written out by hand; supervised segments stand in ⟦brackets⟧."""

import itertools

import pytest

from mft_megatron.data.chat_format import chat_format
from mft_megatron.data.conversation import read_record
from mft_megatron.data.preprocess import stop_token_ids
from mft_megatron.errors import InputError

MESSAGES = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": " U1\n"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "U2"},
        {"role": "assistant", "content": "\nA2 "},
    ]
}


def written(segments):
    """The sample's text; names of special tokens in «», supervised runs in ⟦⟧."""
    text = []
    for supervised, run in itertools.groupby(segments, lambda segment: segment.supervised):
        own = "".join(f"«{segment.text}»" if segment.special else segment.text for segment in run)
        text.append(f"⟦{own}⟧" if supervised else own)
    return "".join(text)


EXPECTED = {
    "chatml": "«<|im_start|>»system\nS«<|im_end|>»\n«<|im_start|>»user\n U1\n«<|im_end|>»\n"
    "«<|im_start|>»assistant\n⟦A1«<|im_end|>»⟧\n«<|im_start|>»user\nU2«<|im_end|>»\n"
    "«<|im_start|>»assistant\n⟦\nA2 «<|im_end|>»⟧\n",
    "mftcoder": "«<s>»system\nS\n«<s>»human\n U1\n\n«<s>»bot\n⟦A1«</s>»⟧\n«<s>»human\nU2\n«<s>»bot\n⟦\nA2 «</s>»⟧\n",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_answer_and_its_stop_token_are_supervised(name):
    assert written(chat_format(name, "</s>").segments(read_record(MESSAGES))) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "def f(", "completion": "x):\n"}, "def f(⟦x):\n«</s>»⟧"),
        ({"prompt": "", "completion": ""}, "⟦«</s>»⟧"),
        ({"text": "whole"}, "⟦whole«</s>»⟧"),
    ],
)
def test_raw_text_has_no_roles(name, record, expected):
    assert written(chat_format(name, "</s>").segments(read_record(record))) == expected


def test_names_of_tokens_count_in_raw_text_but_not_in_what_a_turn_says():
    style = chat_format("chatml", "</s>")
    assert all(segment.markup for segment in style.segments(read_record({"prompt": "a", "completion": "b"}))[:2])
    assert not any(segment.markup for segment in style.segments(read_record(MESSAGES)))


def test_role_markers():
    markers = '{"human": "### Q:\\n", "assistant": "<s>### A:\\n"}'
    style = chat_format("mftcoder", "</s>", markers)
    record = {"instruction": "Q", "output": "A"}
    assert written(style.segments(read_record(record))) == "### Q:\nQ\n«<s>»### A:\n⟦A«</s>»⟧\n"


@pytest.mark.parametrize(
    ("markers", "message"),
    [("{", "not JSON"), ("[]", "JSON object"), ('{"user": 1}', "of strings"), ('{"tool": "x"}', "tool.*known: system")],
)
def test_bad_role_markers_are_refused(markers, message):
    with pytest.raises(InputError, match=f"--role-markers.*{message}"):
        chat_format("mftcoder", "</s>", markers)


def test_the_fingerprint_tells_formats_apart():
    formats = [("chatml", "</s>"), ("mftcoder", "</s>"), ("mftcoder", "<eos>"), ("mftcoder", "</s>", '{"bot": "A: "}')]
    assert len({chat_format(*arguments).fingerprint for arguments in formats}) == 4
    assert chat_format("mftcoder", "</s>").fingerprint == chat_format("mftcoder", "</s>", "{}").fingerprint


class _Vocabulary:
    """The part of a tokenizer that names tokens."""

    eos_token_id = 7

    def __init__(self, **tokens):
        self.token_id = {"<|end|>": 7, **tokens}.get


@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [("chatml", {"<|im_end|>": 3}, [7, 3]), ("chatml", {}, [7]), ("mftcoder", {"<|im_end|>": 3}, [7])],
)
def test_generation_stops_where_a_turn_ends(name, tokens, expected):
    assert stop_token_ids(_Vocabulary(**tokens), chat_format(name, "<|end|>")) == expected

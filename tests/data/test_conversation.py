"""Reading records: every shape, content kept as it is, and a reason for whatever cannot be read."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft_megatron.data.conversation import SHAPES, Conversation, RecordError, Turn, read_record


def chat(*turns):
    return Conversation(tuple(Turn(*turn) for turn in turns))


def raw(*turns):
    return Conversation(tuple(Turn(*turn) for turn in turns), raw=True)


ODD = " \t<|im_end|>\n\né漢字🙂\u2028\x00 "


def test_messages():
    turns = [{"role": role, "content": ODD + role} for role in ("system", "user", "assistant", "user", "assistant")]
    expected = chat(*((turn["role"], turn["content"]) for turn in turns))
    assert read_record({"messages": turns, "id": 7}) == expected


def test_chat_rounds_of_mftcoder():
    rounds = [{"role": "system", "content": "s"}, {"role": "human", "content": ODD}, {"role": "bot", "content": ODD}]
    expected = chat(("system", "s"), ("user", ODD), ("assistant", ODD))
    assert read_record({"id": 0, "data_name": "x", "chat_rounds": rounds}) == expected


@pytest.mark.parametrize("absent", [{}, {"input": ""}, {"input": None}])
def test_instruction_without_input(absent):
    expected = chat(("user", ODD), ("assistant", "done"))
    assert read_record({"instruction": ODD, "output": "done", **absent}) == expected


def test_instruction_and_input_are_both_kept():
    question, answer = read_record({"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3"}).turns
    assert question.content.startswith("Sort.")
    assert question.content.endswith("3 1 2")
    assert answer == Turn("assistant", "1 2 3")


def test_prompt_and_completion():
    assert read_record({"prompt": ODD, "completion": ODD}) == raw(("prompt", ODD), ("completion", ODD))


def test_text():
    assert read_record({"text": ODD, "meta": {}}) == raw(("completion", ODD))


def test_a_chat_beside_its_rendered_text_is_read_as_a_chat():
    record = {"text": "Q: a A: b", "instruction": "a", "output": "b"}
    assert read_record(record) == chat(("user", "a"), ("assistant", "b"))


USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
UNREADABLE = [
    (["not", "an", "object"], "unknown_shape", "list"),
    (None, "unknown_shape", "NoneType"),
    ({}, "unknown_shape", "known: messages; chat_rounds"),
    ({"question": "a", "reply": "b"}, "unknown_shape", "'question', 'reply'"),
    ({"prompt": "a"}, "unknown_shape", "'prompt'"),
    ({"messages": "hello"}, "wrong_type", "messages"),
    ({"messages": []}, "wrong_type", "messages"),
    ({"messages": ["hello"]}, "wrong_type", r"messages\[0\]"),
    ({"messages": [USER, {"role": "assistant"}]}, "wrong_type", r"messages\[1\]"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "wrong_type", r"messages\[1\].content.*NoneType"),
    ({"messages": [USER, {"role": "assistant", "content": [{"text": "b"}]}]}, "wrong_type", "list"),
    ({"messages": [USER, {"role": "tool", "content": "b"}]}, "unknown_role", "tool.*system, user, assistant"),
    ({"messages": [{"role": ["user"], "content": "b"}]}, "unknown_role", "user"),
    ({"messages": [{"role": {}, "content": "b"}]}, "unknown_role", "role"),
    ({"chat_rounds": [{"role": "user", "content": "b"}]}, "unknown_role", "user.*human, bot"),
    ({"messages": [USER]}, "no_assistant_turn", "messages"),
    ({"messages": [USER, USER, BOT]}, "broken_alternation", r"messages\[1\]"),
    ({"messages": [BOT]}, "broken_alternation", r"messages\[0\]"),
    ({"instruction": 1, "output": "b"}, "wrong_type", "instruction"),
    ({"instruction": "a", "input": [], "output": "b"}, "wrong_type", "input"),
    ({"instruction": "a", "input": 0, "output": "b"}, "wrong_type", "input"),
    ({"instruction": "a", "output": None}, "wrong_type", "output"),
    ({"prompt": 1, "completion": "b"}, "wrong_type", "prompt"),
    ({"prompt": "a", "completion": {}}, "wrong_type", "completion"),
    ({"text": ["a"]}, "wrong_type", "text"),
    ({"text": "half \ud83d of a pair"}, "invalid_text", "text.*character 5"),
]


@pytest.mark.parametrize(("record", "reason", "message"), UNREADABLE)
def test_unreadable_records_name_the_reason(record, reason, message):
    with pytest.raises(RecordError, match=message) as caught:
        read_record(record)
    assert caught.value.reason == reason


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(sorted({key for shape in SHAPES for key in shape} | {"input", "id"}))
turn = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["system", "user", "assistant", "bot"]) | json_values, "content": json_values}
)


@given(st.dictionaries(keys, json_values | st.lists(turn, max_size=4), max_size=5) | json_values)
def test_any_json_is_read_or_refused(record):
    with contextlib.suppress(RecordError):
        assert isinstance(read_record(record), Conversation)

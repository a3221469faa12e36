"""Conversations with reasoning in several rounds become one of each round."""

import pytest

from mft_megatron.data.records.conversation import Conversation, Turn
from mft_megatron.data.records.rounds import split_rounds


def user(text):
    return Turn("user", text)


def answer(text, reasoning=None, learn=True, key="reasoning_content", **options):
    return Turn("assistant", text, learn, extra={} if reasoning is None else {key: reasoning}, **options)


def history(text, **options):
    return Turn("assistant", text, False, **options)


SYSTEM = Turn("system", "S")
Q1, Q2, Q3 = map(user, ("1", "2", "3"))
CALL = ({"name": "f", "arguments": {}},)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        # nothing to split: no reasoning before the last round
        ((Q1, answer("a")), None),
        ((Q1, answer("a", "r")), None),
        ((Q1, answer("a"), Q2, answer("b", "r")), None),
        ((Q1, answer("a"), Q2, answer("b")), None),
        (
            (SYSTEM, Q1, answer("a", "r"), Q2, answer("b", "s"), Q3, answer("c")),
            [
                (SYSTEM, Q1, answer("a", "r")),
                (SYSTEM, Q1, history("a"), Q2, answer("b", "s")),
                (SYSTEM, Q1, history("a"), Q2, history("b"), Q3, answer("c")),
            ],
        ),
        # reasoning within the content, with and without its first tag
        (
            (Q1, answer("<think>\nr\n</think>\n\na"), Q2, answer("s</think>b")),
            [(Q1, answer("<think>\nr\n</think>\n\na")), (Q1, history("a"), Q2, answer("s</think>b"))],
        ),
        # an answer that speaks of the tag: servers' templates write what follows its last one
        (
            (Q1, answer("<think>r</think>x</think>\n\na"), Q2, answer("b")),
            [(Q1, answer("<think>r</think>x</think>\n\na")), (Q1, history("a"), Q2, answer("b"))],
        ),
        # a round with calls stays whole; its reasoning stays only in its own sample
        (
            (Q1, answer("", "r", tool_calls=CALL), Turn("tool", "t"), answer("a", "s"), Q2, answer("b")),
            [
                (Q1, answer("", "r", tool_calls=CALL), Turn("tool", "t"), answer("a", "s")),
                (Q1, history("", tool_calls=CALL), Turn("tool", "t"), history("a"), Q2, answer("b")),
            ],
        ),
        # rounds that are not learned are history, and so is a question at the end
        (
            (Q1, answer("a", "r", learn=False), Q2, answer("b", "s"), Q3),
            [(Q1, history("a"), Q2, answer("b", "s"))],
        ),
        ((Q1, answer("a", "r", key="thinking"), Q2), [(Q1, answer("a", "r", key="thinking"))]),
    ],
)
def test_rounds(turns, expected):
    conversation = Conversation(turns, tools=({"name": "f"},))
    expected = [turns] if expected is None else expected
    assert split_rounds(conversation) == [Conversation(tuple(one), tools=conversation.tools) for one in expected]


def test_other_keys_of_a_turn_stay_in_the_history():
    turns = (Q1, Turn("assistant", "a", extra={"reasoning": "r", "name": "n"}), Q2, answer("b"))
    assert split_rounds(Conversation(turns))[1].turns[1] == Turn("assistant", "a", False, extra={"name": "n"})


def test_raw_text_is_not_split():
    raw = Conversation((Turn("prompt", "</think>"), Turn("completion", "a</think>b")), raw=True)
    assert split_rounds(raw) == [raw]

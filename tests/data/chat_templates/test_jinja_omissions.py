"""Parts of answers that templates leave out are counted: whitespace around them, and reasoning."""

import pytest

from mft_megatron.data.chat_templates.formats import chat_format
from mft_megatron.data.records.conversation import Conversation, Turn
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.tokenizers.load import load_tokenizer
from tests.data.chat_templates.templates import QWEN2, TAGGED, TEMPLATES, save_tokenizer

LEADING, TRAILING, CHANGED = {"leading_whitespace": 1}, {"trailing_whitespace": 1}, {"answers_changed": 1}
EARLIER, LAST = {"earlier_reasoning": 1}, {"last_reasoning": 1}
TRIMMING = ("llama3", "llama2", "gemma")
THOUGHT = "<think>\nwhy\n</think>\n\n"

REWORDED = QWEN2.replace("message.content + '<|im_end|>", "message.content | replace('colour', 'color') + '<|im_end|>")
FIRST_LINE = QWEN2.replace("message.content + '<|im_end|>", "message.content.split('\\n')[0] + '<|im_end|>")
TRIMMING_TAGGED = TAGGED.replace("{{- message['content'] }}{%- endgen", "{{- message['content'] | trim }}{%- endgen")
LEFT_ALONE = QWEN2.replace("message.content + '<|im_end|>", "message.content.lstrip() + '<|im_end|>")
OTHERS = {
    "reworded": REWORDED,
    "first line": FIRST_LINE,
    "trimming, tagged": TRIMMING_TAGGED,
    "left": LEFT_ALONE,
    # answers may begin and end with line breaks in its own
    "lines": QWEN2.replace("message.content + '<|im_end|>", "message.content.strip('\\n') + '<|im_end|>"),
}


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    """A function that writes a conversation with a template and returns the counts."""
    folder = tmp_path_factory.mktemp("omissions")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save_tokenizer(folder / "tokenizer"))
    for name, text in {**TEMPLATES, **OTHERS}.items():
        (folder / f"{name}.jinja").write_text(text)

    def noted(name, *turns, supervise="all"):
        notes = RecordNotes()
        chat_format(str(folder / f"{name}.jinja"), tokenizer, supervise=supervise).segments(Conversation(turns), notes)
        assert not notes.unread_keys
        return dict(notes.kinds)

    return noted


def asked(answer, **options):
    return Turn("user", "  Q  "), Turn("assistant", answer, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        ("x = 1", {}),
        ("    if x:\n        return 1\n    return 0", LEADING),
        ("return 0\n", TRAILING),
        ("\n\nreturn 0\n\n", LEADING | TRAILING),
        ("\treturn <|im_end|> 0  ", LEADING | TRAILING),
    ],
)
def test_whitespace_around_answers(noted, name, answer, kinds):
    assert noted(name, *asked(answer)) == (kinds if name in TRIMMING else {})


def test_whitespace_is_counted_by_answer(noted):
    turns = [turn for answer in ("  a", "b", " c ", "  a") for turn in asked(answer)]
    assert noted("llama3", *turns) == {"leading_whitespace": 3, "trailing_whitespace": 1}
    assert noted("trimming, tagged", *turns) == {"leading_whitespace": 3, "trailing_whitespace": 1}
    # another answer that has the same text with its spaces does not stand for it
    assert noted("llama3", *asked("  a"), *asked("if x:\n  a")) == LEADING
    # only supervised answers count, and nothing that is asked
    assert noted("llama3", *turns, supervise="last") == {"leading_whitespace": 1}
    assert noted("llama3", *turns[:4], *asked(" c ", learn=False), *turns[:2]) == {"leading_whitespace": 2}


@pytest.mark.parametrize(
    ("name", "answer", "kinds"),
    [
        ("reworded", "a colour ", CHANGED),
        ("reworded", "a color ", {}),
        ("first line", "x = 1\ny = 2", CHANGED),
        ("first line", "x = 1", {}),
        ("left", "  x\n", LEADING),
        ("lines", "\n  x\n", LEADING | TRAILING),
        ("lines", "  x", {}),
        ("trimming, tagged", "\n x", LEADING),
    ],
)
def test_other_changes_of_answers(noted, name, answer, kinds):
    assert noted(name, *asked(answer)) == kinds


def thought(answer, way):
    if way == "content":
        return Turn("assistant", THOUGHT + answer)
    if way == "opened by the prompt":
        return Turn("assistant", f"why\n</think>\n\n{answer}")
    return Turn("assistant", answer, extra={way: "why"})


@pytest.mark.parametrize("way", ["content", "opened by the prompt", "reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("name", ["qwen3", "thinking", "qwen2", "tagged", "parted", "reasoner"])
def test_reasoning_in_earlier_rounds_and_in_the_last(noted, name, way):
    in_key = way not in ("content", "opened by the prompt")
    if in_key and name in ("qwen2", "tagged", "reasoner"):
        return  # refused, as another test shows
    question, plain = Turn("user", "Q"), Turn("assistant", "A")
    earlier, last = {
        "qwen3": (EARLIER, {}),
        "thinking": (EARLIER, {}),
        "reasoner": (EARLIER, LAST),
    }.get(name, ({}, {}))
    assert noted(name, question, thought("A", way), question, plain) == earlier
    assert noted(name, question, plain, question, thought("A", way)) == last
    assert noted(name, question, thought("A", way), question, thought("B", way)) == earlier | last
    # a question at the end makes the round before it an earlier one
    assert noted(name, question, thought("A", way), question) == (earlier if name != "parted" or not in_key else {})


def test_each_answer_without_its_reasoning_counts(noted):
    turns = [turn for index in range(4) for turn in (Turn("user", "Q"), thought(f"A{index}", "reasoning_content"))]
    assert noted("qwen3", *turns) == {"earlier_reasoning": 3}
    silent = [Turn("user", "Q"), Turn("assistant", "A", False, (), {"reasoning_content": "why"})]
    assert noted("qwen3", *silent, *turns[:2]) == EARLIER  # the model sees a history that never thinks


def test_reasoning_that_an_answer_repeats_is_still_found_missing(noted):
    answer = Turn("assistant", "why", extra={"reasoning_content": "why"})
    assert noted("qwen3", Turn("user", "why"), answer, Turn("user", "Q"), Turn("assistant", "A")) == EARLIER


def test_code_after_reasoning_keeps_its_spaces(noted):
    assert noted("qwen3", *asked(f"{THOUGHT}    return 0\n")) == {}
    assert noted("llama3", *asked(f"{THOUGHT}    return 0\n")) == TRAILING

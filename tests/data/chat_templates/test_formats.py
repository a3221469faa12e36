"""Chat formats against texts written by hand and with any content; supervised segments are in ⟦brackets⟧."""

import itertools
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft_megatron.data.chat_templates.builtin_formats import FORMATS
from mft_megatron.data.chat_templates.formats import chat_format
from mft_megatron.data.records.conversation import Conversation, RecordError, Turn
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.records.record_formats import read_record
from mft_megatron.data.records.segments import REASONING, turn_weights
from mft_megatron.errors import InputError
from tests.data.chat_templates.segment_text import supervised_text, written
from tests.data.chat_templates.templates import QWEN2

MESSAGES = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": " U1\n"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "U2"},
        {"role": "assistant", "content": "\nA2 "},
    ]
}


class Vocabulary:
    """The part of a tokenizer that formats read."""

    chat_template = bos_token = None
    special_tokens = {}  # noqa: RUF012

    def __init__(self, end_of_text="</s>", chat_template=None, **tokens):
        self.end_of_text, self.chat_template = end_of_text, chat_template
        self.token_id = {end_of_text: 7, **tokens}.get

    def encode_batch(self, texts, markup=False):
        return [list(text.encode()) for text in texts]


def format_of(name, *arguments, end_of_text="</s>", **options):
    return chat_format(name, Vocabulary(end_of_text), *arguments, **options)


EXPECTED = {
    "chatml": "«<|im_start|>»system\nS«<|im_end|>»\n«<|im_start|>»user\n U1\n«<|im_end|>»\n"
    "«<|im_start|>»assistant\n⟦A1«<|im_end|>»⟧\n«<|im_start|>»user\nU2«<|im_end|>»\n"
    "«<|im_start|>»assistant\n⟦\nA2 «<|im_end|>»⟧\n",
    "mftcoder": "«<s>»system\nS\n«<s>»human\n U1\n\n«<s>»bot\n⟦A1«</s>»⟧\n«<s>»human\nU2\n«<s>»bot\n⟦\nA2 «</s>»⟧\n",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_answer_and_its_stop_token_are_supervised(name):
    assert written(format_of(name).segments(read_record(MESSAGES))) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "def f(", "completion": "x):\n"}, "def f(⟦x):\n«</s>»⟧"),
        ({"prompt": "", "completion": "\n"}, "⟦\n«</s>»⟧"),
        ({"text": "whole"}, "⟦whole«</s>»⟧"),
    ],
)
def test_raw_text_has_no_roles(name, record, expected):
    assert written(format_of(name).segments(read_record(record))) == expected


@pytest.mark.parametrize("name", EXPECTED)
def test_only_raw_prompts_are_markup(name):
    style = format_of(name)
    raw = style.segments(read_record({"prompt": "a", "completion": "b"}))
    assert [segment.text for segment in raw if segment.markup] == ["a"]
    for record in ({"text": "whole"}, MESSAGES):
        assert not any(segment.markup for segment in style.segments(read_record(record)))


ROUND = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]
ANSWERED = [*ROUND, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize(
    ("record", "supervise"),
    [
        ({"messages": ROUND}, "all"),
        ({"messages": [*ROUND, *ROUND]}, "all"),
        ({"messages": [ROUND[0], {"role": "assistant", "content": " \n"}]}, "all"),
        ({"messages": [*ANSWERED, *ROUND]}, "last"),
        ({"messages": [*ANSWERED[:3], {**ANSWERED[3], "train": False}]}, "all"),
        ({"prompt": "a", "completion": ""}, "all"),
        ({"text": ""}, "all"),
    ],
)
def test_answers_that_are_all_empty_are_refused(name, record, supervise):
    with pytest.raises(RecordError, match="empty") as error:
        format_of(name, supervise=supervise).segments(read_record(record))
    assert error.value.reason == "empty_answer"


@pytest.mark.parametrize(("learn", "stops", "counted"), [(False, 0, 2), (True, 2, 0)])
def test_an_empty_answer_among_others_is_counted_and_learnt_only_if_asked_for(learn, stops, counted):
    conversation, notes = read_record({"messages": [*ROUND, *ANSWERED]}), RecordNotes()
    segments = format_of("chatml", learn_empty_answers=learn).segments(conversation, notes)
    assert supervised_text(segments) == "<|im_end|>" * stops + "A<|im_end|>"
    assert "".join(segment.text for segment in segments).count("<|im_end|>") == len(conversation.turns)
    assert notes.kinds["empty_answer_not_learnt"] == counted


@pytest.mark.parametrize("name", FORMATS)
def test_answers_that_are_all_empty_are_learnt_if_asked_for(name):
    style = format_of(name, learn_empty_answers=True)
    assert supervised_text(style.segments(read_record({"messages": ROUND}))) == style.stop_token
    assert supervised_text(style.segments(read_record({"prompt": "a", "completion": ""}))) == style.end_of_text
    with pytest.raises(RecordError, match="empty"):
        style.segments(read_record({"text": ""}))
    assert style.fingerprint != format_of(name).fingerprint


def test_calls_alone_are_no_empty_answer():
    calling = Conversation((Turn("user", "Q"), Turn("assistant", "", tool_calls=(CALL,))))
    assert format_of("chatml").segments(calling)


@pytest.mark.parametrize("key", REASONING)
def test_reasoning_alone_is_no_empty_answer(key):
    turns = Turn("user", "Q"), Turn("assistant", "", extra={key: "why"}), Turn("user", "Q"), Turn("assistant", "A")
    for conversation in (Conversation(turns), Conversation(turns[:2])):
        notes = RecordNotes()
        learned = [index % 2 == 1 for index in range(len(conversation.turns))]
        assert turn_weights(conversation, "all", notes) == learned
        assert not notes.kinds


turns = st.lists(
    st.tuples(st.text(max_size=6) | st.sampled_from(["<|im_end|>", "</s>", "<s>", "\n"]), st.booleans()), min_size=1
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=turns, system=st.none() | st.text(max_size=4), supervise=st.sampled_from(["all", "last"]))
@pytest.mark.parametrize("name", FORMATS)
def test_any_content(name, contents, system, supervise):
    style = format_of(name, supervise=supervise)
    roles = itertools.cycle(("user", "assistant"))
    read = [Turn(role, content, learn) for role, (content, learn) in zip(roles, contents)]  # noqa: B905
    conversation = Conversation((*([] if system is None else [Turn("system", system)]), *read))
    answers = [turn for turn in read if turn.role == "assistant"]
    learned = [turn.content for turn in (answers if supervise == "all" else answers[-1:]) if turn.learn]
    if not learned:
        with pytest.raises(RecordError) as error:
            style.segments(conversation)
        assert error.value.reason == "nothing_to_learn"
        return
    learned = [content for content in learned if content.strip()]
    if not learned:
        with pytest.raises(RecordError) as error:
            style.segments(conversation)
        assert error.value.reason == "empty_answer"
        return
    segments = style.segments(conversation)
    supervised = [segment for segment in segments if segment.supervised]
    assert "".join(segment.text for segment in supervised) == "".join(text + style.stop_token for text in learned)
    assert [segment.text for segment in supervised if segment.special] == [style.stop_token] * len(learned)
    # the whole sample, turn by turn
    ends = {"chatml": ("<|im_end|>\n",) * 2, "mftcoder": ("\n", "</s>\n")}[name]
    openings = {"chatml": "<|im_start|>{}\n", "mftcoder": "{}"}[name]
    assert "".join(segment.text for segment in segments) == "".join(
        openings.format(style.markers[turn.role]) + turn.content + ends[turn.role == "assistant"]
        for turn in conversation.turns
    )


CALL = {"name": "add", "arguments": {"a": 1, "b": "é"}}
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}, {"name": "ü"})
WITH_TOOLS = Conversation(
    (
        Turn("system", "S"),
        Turn("user", "U"),
        Turn("assistant", "", tool_calls=(CALL,)),
        Turn("tool", "2", extra={"name": "add", "tool_call_id": "1"}),
        Turn("assistant", "So:", tool_calls=(CALL, CALL)),
        Turn("tool", "3"),
        Turn("tool", "4"),
        Turn("assistant", "A"),
    ),
    tools=TOOLS,
)


def test_tools_are_written_as_in_the_template_of_qwen():
    """The marker of their answers differs, so it is set by an option."""
    tokenizer = Vocabulary(chat_template=QWEN2)
    theirs = chat_format("auto", tokenizer)
    ours = chat_format("chatml", tokenizer, '{"tool": "user"}')
    for conversation in (WITH_TOOLS, Conversation(WITH_TOOLS.turns), read_record(MESSAGES)):
        text = "".join(segment.text for segment in theirs.segments(conversation))
        assert "".join(segment.text for segment in ours.segments(conversation)) == text


LISTED = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
{"name": "ü"}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
WRITTEN_CALL = '«<tool_call>»\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n«</tool_call>»'
TOOL_TEXT = {
    "chatml": f"«<|im_start|>»system\nS\n\n{LISTED}«<|im_end|>»\n«<|im_start|>»user\nU«<|im_end|>»\n"
    f"«<|im_start|>»assistant\n⟦{WRITTEN_CALL}«<|im_end|>»⟧\n"
    "«<|im_start|>»tool\n«<tool_response>»\n2\n«</tool_response>»«<|im_end|>»\n"
    f"«<|im_start|>»assistant\n⟦So:\n{WRITTEN_CALL}\n{WRITTEN_CALL}«<|im_end|>»⟧\n"
    "«<|im_start|>»tool\n«<tool_response>»\n3\n«</tool_response>»\n«<tool_response>»\n4\n«</tool_response>»"
    "«<|im_end|>»\n«<|im_start|>»assistant\n⟦A«<|im_end|>»⟧\n",
    "mftcoder": f"«<s>»system\nS\n\n{LISTED}\n«<s>»human\nU\n«<s>»bot\n⟦{WRITTEN_CALL}«</s>»⟧\n«<s>»tool\n2\n"
    f"«<s>»bot\n⟦So:\n{WRITTEN_CALL}\n{WRITTEN_CALL}«</s>»⟧\n«<s>»tool\n3\n«<s>»tool\n4\n«<s>»bot\n⟦A«</s>»⟧\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_calls_of_tools_are_supervised_and_their_answers_are_not(name):
    assert written(format_of(name).segments(WITH_TOOLS)) == TOOL_TEXT[name]


def test_tools_add_a_system_turn_if_there_is_none():
    segments = format_of("chatml").segments(Conversation(WITH_TOOLS.turns[1:], tools=TOOLS))
    assert written(segments) == TOOL_TEXT["chatml"].replace("S\n\n#", "#")


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_is_excluded_from_training(name):
    turns = [Turn("user", "U"), Turn("assistant", "", False, (CALL,)), Turn("tool", "2"), Turn("assistant", "A")]
    segments = format_of(name).segments(Conversation(tuple(turns)))
    assert supervised_text(segments) == f"A{format_of(name).stop_token}"
    assert WRITTEN_CALL in written(segments)


@pytest.mark.parametrize("name", FORMATS)
def test_reasoning_beside_the_content_is_not_lost(name):
    conversation = Conversation((Turn("user", "U"), Turn("assistant", "A", extra={"reasoning_content": "R"})))
    with pytest.raises(RecordError, match=f"turn 1 has reasoning.*--chat-template {name} cannot write") as error:
        format_of(name).segments(conversation)
    assert error.value.reason == "reasoning_has_no_place"


def test_raw_text_that_is_excluded_from_training():
    with pytest.raises(RecordError) as error:
        format_of("chatml").segments(
            Conversation((Turn("prompt", "a"), Turn("completion", "b", learn=False)), raw=True)
        )
    assert error.value.reason == "nothing_to_learn"


def test_role_markers():
    markers = '{"human": "### Q:\\n", "assistant": "<s>### A:\\n", "tool": "<s>", "system": ""}'
    style = format_of("mftcoder", markers)
    record = {"instruction": "Q", "output": "A"}
    assert written(style.segments(read_record(record))) == "### Q:\nQ\n«<s>»### A:\n⟦A«</s>»⟧\n"
    turns = [Turn("system", "S"), Turn("user", "Q"), Turn("assistant", "", tool_calls=(CALL,)), Turn("tool", "T")]
    text = written(style.segments(Conversation(tuple(turns))))
    assert text == f"S\n### Q:\nQ\n«<s>»### A:\n⟦{WRITTEN_CALL}«</s>»⟧\n«<s>»T\n"


@pytest.mark.parametrize(
    ("markers", "message"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"user": 1}', "of strings"),
        ('{"user": "Q \\ud83d:"}', "marker of user holds half a surrogate pair"),
        ('{"robot": "x"}', "robot.*known: system"),
    ],
)
def test_bad_role_markers_are_refused(markers, message):
    with pytest.raises(InputError, match=f"--role-markers.*{message}"):
        format_of("mftcoder", markers)


def test_unknown_values_of_supervise_are_refused():
    with pytest.raises(InputError, match="--supervise first: give one of all, last"):
        format_of("chatml", supervise="first")


def test_auto_without_a_template():
    assert chat_format("auto", Vocabulary()).name == "mftcoder"
    assert chat_format("auto", Vocabulary(**{"<|im_end|>": 3})).name == "chatml"


def test_fingerprints_of_different_formats_differ():
    styles = [
        format_of("chatml"),
        format_of("mftcoder"),
        format_of("mftcoder", end_of_text="<eos>"),
        format_of("mftcoder", '{"bot": "A: "}'),
        format_of("mftcoder", supervise="last"),
    ]
    assert len({style.fingerprint for style in styles}) == 5
    assert format_of("mftcoder").fingerprint == format_of("mftcoder", "{}").fingerprint


@pytest.mark.parametrize("name", FORMATS)
def test_formats_can_be_pickled_for_workers(name):
    style = format_of(name)
    written_here = style.segments(WITH_TOOLS)
    assert pickle.loads(pickle.dumps(style)).segments(WITH_TOOLS) == written_here


@pytest.mark.parametrize(("name", "stop"), [("chatml", "<|im_end|>"), ("mftcoder", "<|end|>")])
def test_the_token_that_ends_a_turn(name, stop):
    assert format_of(name, end_of_text="<|end|>").stop_token == stop

"""Reading records: every format, content kept as it is, and a reason for whatever cannot be read."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_megatron.data.records.conversation import EXTRA_KEYS, Conversation, RecordError, Turn
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.records.record_formats import RECORD_FORMATS, read_record


def chat(*turns, tools=()):
    return Conversation(tuple(Turn(*turn) for turn in turns), tools=tools)


def raw(*turns, document=False):
    return Conversation(tuple(Turn(*turn) for turn in turns), raw=True, document=document)


ODD = " \t<|im_end|>\n\né漢字🙂\u2028\x00 "


def turns_of(*pairs, role="role", content="content"):
    return [{role: one, content: other} for one, other in pairs]


# -------------------------------------------------------------------------------------------------------------- formats


def test_messages():
    turns = turns_of(*((role, ODD + role) for role in ("system", "user", "assistant", "user", "assistant")))
    expected = chat(*((turn["role"], turn["content"]) for turn in turns))
    assert read_record({"messages": turns, "id": 7}) == expected


def test_other_names_of_openai_roles():
    """Few chat templates write turns of developer, so a server must get them as system turns: a note says so."""
    turns = turns_of(("developer", "s"), ("user", "q"), ("assistant", "a"))
    notes = RecordNotes()
    assert read_record({"messages": turns}, notes=notes) == chat(("system", "s"), ("user", "q"), ("assistant", "a"))
    assert read_record({"messages": [{"role": "system", "content": "s"}, *turns[1:]]}, notes=notes)
    assert notes.kinds == {"developer_turn": 1}


@pytest.mark.parametrize(("user", "bot"), [("human", "bot"), ("user", "assistant"), ("human", "gpt")])
def test_chat_rounds_of_mftcoder(user, bot):
    rounds = turns_of(("system", "s"), (user, ODD), (bot, ODD))
    expected = chat(("system", "s"), ("user", ODD), ("assistant", ODD))
    assert read_record({"id": 0, "data_name": "x", "chat_rounds": rounds}) == expected


@pytest.mark.parametrize(("user", "bot"), [("human", "gpt"), ("user", "assistant"), ("human", "bot")])
@pytest.mark.parametrize("keys", [{"role": "from", "content": "value"}, {}])
def test_conversations_of_sharegpt(user, bot, keys):
    turns = turns_of(("system", ""), (user, ODD), (bot, ODD), (user, "?"), (bot, ""), **keys)
    expected = chat(("system", ""), ("user", ODD), ("assistant", ODD), ("user", "?"), ("assistant", ""))
    assert read_record({"conversations": turns}) == expected


@pytest.mark.parametrize("key", ["messages", "chat_rounds", "conversations"])
def test_the_records_own_system_text_comes_first(key):
    turns = turns_of(("user", "q"), ("assistant", "a"))
    expected = [("user", "q"), ("assistant", "a")]
    assert read_record({"system": ODD, key: turns}) == chat(("system", ODD), *expected)
    assert read_record({"system": "", key: turns}) == chat(*expected)
    assert read_record({"system": None, key: turns}) == chat(*expected)


@pytest.mark.parametrize("absent", [{}, {"input": ""}, {"input": None}, {"history": []}, {"history": None}])
@pytest.mark.parametrize("output", ["output", "response"])
def test_instruction_without_input(absent, output):
    expected = chat(("user", ODD), ("assistant", "done"))
    assert read_record({"instruction": ODD, output: "done", **absent}) == expected


def test_instruction_and_input_are_both_kept():
    question, answer = read_record({"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3"}).turns
    assert question.content == "Sort.\n\n3 1 2"
    assert answer == Turn("assistant", "1 2 3")


def test_history_and_system_come_before_the_instruction():
    record = {"instruction": "c", "output": "d", "system": "s", "history": [["a", ODD], ["e", "f"]]}
    expected = [("system", "s"), ("user", "a"), ("assistant", ODD), ("user", "e"), ("assistant", "f")]
    assert read_record(record) == chat(*expected, ("user", "c"), ("assistant", "d"))


@pytest.mark.parametrize("answer", ["completion", "response", "answer"])
def test_prompt_and_completion(answer):
    assert read_record({"prompt": ODD, answer: ODD}) == raw(("prompt", ODD), ("completion", ODD))


@pytest.mark.parametrize("question", ["question", "query", "input", "problem", "instruction"])
@pytest.mark.parametrize("answer", ["answer", "response", "output", "solution", "completion"])
def test_question_and_answer_are_a_chat(question, answer):
    assert read_record({question: ODD, answer: "b"}) == chat(("user", ODD), ("assistant", "b"))


def test_text():
    assert read_record({"text": ODD, "meta": {}}) == raw(("completion", ODD), document=True)


# --------------------------------------------------------------------------------------------------- which format it is


def test_the_first_format_of_the_table_wins():
    a_chat = turns_of(("user", "m"), ("assistant", "n"))
    record = {
        "text": "t",
        "answer": "a",
        "question": "q",
        "completion": "c",
        "prompt": "p",
        "output": "o",
        "instruction": "i",
        "conversations": a_chat,
        "chat_rounds": a_chat,
        "messages": a_chat,
        "conversation": a_chat,
    }
    firsts = {
        "messages": chat(("user", "m"), ("assistant", "n")),
        "chat_rounds": chat(("user", "m"), ("assistant", "n")),
        "conversations": chat(("user", "m"), ("assistant", "n")),
        "instruction": chat(("user", "i"), ("assistant", "o")),
        "prompt_completion": raw(("prompt", "p"), ("completion", "c")),
        "question_answer": chat(("user", "q"), ("assistant", "a")),
        "text": raw(("completion", "t"), document=True),
        "conversation": chat(("user", "m"), ("assistant", "n")),
    }
    assert list(firsts) == list(RECORD_FORMATS)
    for format_name, expected in firsts.items():
        assert read_record(record, format_name) == expected
        assert read_record(record) == expected
        record = {key: value for key, value in record.items() if key != RECORD_FORMATS[format_name].keys[0][0]}


def test_keys_that_are_null_do_not_count():
    record = {"messages": None, "chat_rounds": None, "completion": None, "prompt": "a", "response": "b", "text": "c"}
    assert read_record(record) == raw(("prompt", "a"), ("completion", "b"))


def test_a_prompt_is_a_question_where_the_format_says_so():
    record = {"prompt": "a", "completion": "b", "system": "s"}
    assert read_record(record, "question_answer") == chat(("system", "s"), ("user", "a"), ("assistant", "b"))
    record = {"prompt": "a", "instruction": "i", "completion": "b"}
    assert read_record(record, "question_answer") == chat(("user", "i\n\na"), ("assistant", "b"))
    assert read_record({"prompt": "a", "answer": "b"}, "question_answer") == chat(("user", "a"), ("assistant", "b"))


# ------------------------------------------------------------------------------------------------------ tools and marks

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2.5, "é"]}'}}
READ_CALL = {"name": "add", "arguments": {"a": 1, "b": [2.5, "é"]}, "id": "c1"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("absent", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tool_calls_of_openai(absent, tools):
    record = {
        "messages": [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "tool_calls": [CALL, {"name": "now"}], **absent},
            {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
            {"role": "function", "content": "noon"},
            {"role": "assistant", "content": "3", "tool_calls": [], "reasoning_content": ODD},
        ],
        "tools": tools,
    }
    assert read_record(record) == chat(
        ("user", "1 + 2?"),
        ("assistant", "", True, (READ_CALL, {"name": "now", "arguments": {}})),
        ("tool", "3", True, (), {"tool_call_id": "c1", "name": "add"}),
        ("tool", "noon"),
        ("assistant", "3", True, (), {"reasoning_content": ODD}),
        tools=(TOOL,),
    )


def test_a_tool_call_beside_text_and_the_old_function_call():
    call = {"name": "f", "arguments": {"x": None}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
    ]
    read = read_record({"messages": turns}).turns
    assert (read[1].content, read[1].tool_calls) == ("I look.", (call,))
    assert read[3] == Turn("assistant", "", tool_calls=({"name": "f", "arguments": {}},))


def test_text_and_calls_in_two_turns_keep_the_keys_of_both():
    said = {"role": "assistant", "content": "I look.", "reasoning_content": "why"}
    calling = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}], "name": "bot"}
    read = read_record({"messages": [USER, said, calling]}).turns
    call = {"name": "f", "arguments": {}}
    extra = {"reasoning_content": "why", "name": "bot"}
    assert read[1:] == (Turn("assistant", "I look.", tool_calls=(call,), extra=extra),)


@pytest.mark.parametrize("reply", ["observation", "tool", "function", "function_response"])
@pytest.mark.parametrize("several", [False, True])
def test_tool_calls_of_sharegpt(reply, several):
    call = {"name": "f", "arguments": {"x": 1}}
    value = json.dumps([call, call] if several else call)
    turns = turns_of(("human", "q"), ("function_call", value), (reply, "r"), ("gpt", "a"), role="from", content="value")
    calls = (call, call) if several else (call,)
    assert read_record({"conversations": turns, "tools": "[]"}) == chat(
        ("user", "q"), ("assistant", "", True, calls), ("tool", "r"), ("assistant", "a")
    )


def test_parts_of_text_are_concatenated():
    parts = [{"type": "text", "text": ODD}, {"type": "text", "text": "b"}]
    turns = turns_of(("user", parts), ("assistant", []))
    assert read_record({"messages": turns}) == chat(("user", ODD + "b"), ("assistant", ""))


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": True, "weight": 0}])
@pytest.mark.parametrize("unmarked", [{}, {"train": True}, {"weight": 1}, {"weight": None, "train": None}])
def test_turns_that_are_excluded_from_training(mark, unmarked):
    turns = turns_of(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    turns[1].update(mark)
    turns[3].update(unmarked)
    read = read_record({"messages": turns}).turns
    assert [turn.learn for turn in read] == [True, False, True, True]


@pytest.mark.parametrize("learned", [0, 1])
def test_one_turn_to_train_on_is_enough(learned):
    turns = turns_of(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    turns[3 - 2 * learned]["train"] = False
    read = read_record({"messages": turns}).turns
    assert [turn.learn for turn in read if turn.role == "assistant"] == [learned == 0, learned == 1]


def test_a_question_may_come_last():
    turns = turns_of(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert read_record({"messages": turns}) == chat(("user", "a"), ("assistant", "b"), ("user", "c"))


# --------------------------------------------------------------------------------------------- records that are refused

USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM, REPLY = {"role": "system", "content": "s"}, {"role": "tool", "content": "r"}
CALLING = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}


def calling(call):
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}


def function_call(text):
    return {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": text}]}


def saying(content):
    return {"messages": [USER, {"role": "assistant", "content": content}]}


UNREADABLE = [
    (["not", "an", "object"], "unknown_shape", "list"),
    (None, "unknown_shape", "NoneType"),
    ({}, "unknown_shape", "known: messages; chat_rounds"),
    ({"question": "a", "reply": "b"}, "unknown_shape", "'question', 'reply'"),
    ({"prompt": "a"}, "unknown_shape", "'prompt'"),
    ({"a\nb": "a"}, "unknown_shape", r"'a\\nb'"),
    ({"messages": "hello"}, "wrong_type", "messages"),
    ({"messages": None}, "wrong_type", "messages"),
    ({"messages": []}, "wrong_type", "messages"),
    ({"messages": ["hello"]}, "wrong_type", r"messages\[0\]"),
    ({"messages": [USER, {"role": "assistant"}]}, "wrong_type", r"messages\[1\] .*no content"),
    ({"messages": [{"content": "b"}]}, "wrong_type", r"messages\[0\] .*no role"),
    ({"conversations": [{"from": "human"}]}, "wrong_type", r"conversations\[0\] .*no value"),
    ({"messages": [{"from": "human", "value": "a"}]}, "wrong_type", r"messages\[0\] .*no role"),
    (saying(None), "wrong_type", r"messages\[1\].content.*NoneType"),
    (saying([{"text": "b"}]), "wrong_type", "list"),
    (saying(["b"]), "wrong_type", "item 0"),
    (saying([{"type": "text"}]), "wrong_type", "item 0"),
    (saying([{"type": "text", "text": 1}]), "wrong_type", r"\[1\].content\[0\].text.*int"),
    (saying([{"type": "image_url", "image_url": {}}]), "unsupported_content", r"messages\[1\].*'image_url'"),
    ({"messages": [USER, {"role": "Assistant", "content": "b"}]}, "unknown_role", "'Assistant'.*user, assistant"),
    ({"messages": [{"role": ["user"], "content": "b"}]}, "unknown_role", "list"),
    ({"messages": [{"role": {}, "content": "b"}]}, "unknown_role", "role"),
    ({"messages": [{"role": None, "content": "b"}]}, "unknown_role", "NoneType"),
    ({"messages": [{"role": "human", "content": "b"}]}, "unknown_role", "human"),
    ({"chat_rounds": [{"role": "observation", "content": "b"}]}, "unknown_role", "observation.*human, bot"),
    ({"conversations": [{"from": "llama", "value": "b"}]}, "unknown_role", r"conversations\[0\] has .*llama"),
    ({"messages": [USER]}, "no_assistant_turn", "messages"),
    ({"messages": [USER, BOT | {"train": False}]}, "no_learned_turn", "messages"),
    ({"messages": [USER, USER, BOT]}, "broken_alternation", r"messages\[1\]"),
    ({"messages": [USER, BOT, BOT]}, "broken_alternation", r"messages\[2\]"),
    ({"messages": [BOT]}, "broken_alternation", r"messages\[0\]"),
    ({"messages": [SYSTEM, BOT]}, "broken_alternation", r"messages\[1\]"),
    ({"messages": [USER, SYSTEM, BOT]}, "broken_alternation", r"messages\[1\]"),
    ({"messages": [USER, REPLY, BOT]}, "broken_alternation", r"messages\[1\]"),
    ({"messages": [USER, CALLING, BOT]}, "broken_alternation", r"messages\[2\].*tool call; expected tool"),
    ({"messages": [USER, CALLING, USER]}, "broken_alternation", r"messages\[2\]"),
    ({"messages": [USER, CALLING, REPLY, USER]}, "broken_alternation", r"messages\[3\]"),
    ({"messages": [USER | {"tool_calls": CALLING["tool_calls"]}, BOT]}, "wrong_type", r"\[0\].tool_calls"),
    ({"messages": [USER, BOT | {"tool_calls": "f()"}]}, "wrong_type", r"\[1\].tool_calls.*str"),
    (calling("f"), "invalid_tool_call", r"messages\[1\].tool_calls\[0\]"),
    (calling({"arguments": {}}), "invalid_tool_call", "name"),
    (calling({"name": "", "arguments": {}}), "invalid_tool_call", "name"),
    (calling({"name": "f", "arguments": "{"}), "invalid_tool_call", r"tool_calls\[0\].arguments is not JSON"),
    (calling({"name": "f", "arguments": "[1]"}), "invalid_tool_call", "arguments must be an object, not list"),
    (calling({"name": "f", "arguments": "[" * 100_000}), "invalid_tool_call", "nested too deeply"),
    (calling({"name": "f", "type": "retrieval"}), "invalid_tool_call", "type"),
    (calling({"name": "f", "arguments": '{"a": "\\ud83d"}'}), "invalid_text", "arguments"),
    (calling({"name": "f", "arguments": {"a": {1, 2}}}), "wrong_type", "arguments.*set"),
    (calling({"name": "f", "id": 7}), "wrong_type", "id"),
    (function_call("f(x)"), "invalid_tool_call", r"conversations\[1\].value is not JSON"),
    (function_call("[]"), "invalid_tool_call", r"conversations\[1\].value is an empty list"),
    ({"messages": [USER, BOT], "tools": "search"}, "invalid_tools", "tools is not JSON"),
    ({"messages": [USER, BOT], "tools": {"name": "f"}}, "invalid_tools", "tools must be a list"),
    ({"messages": [USER, BOT], "tools": ["f"]}, "invalid_tools", "tools must be a list"),
    ({"messages": [USER, BOT], "tools": [{"name": "\ud83d"}]}, "invalid_text", "tools"),
    ({"messages": [{**SYSTEM, "tools": "f"}, USER, BOT]}, "invalid_tools", r"messages\[0\]\.tools is not JSON"),
    ({"messages": [USER, BOT], "system": 1}, "wrong_type", "system"),
    ({"messages": [USER, BOT | {"train": "no"}]}, "wrong_type", r"\[1\].train"),
    (
        {"messages": [USER, BOT | {"weight": -1}]},
        "unsupported_weight",
        r"\[1\].weight must be 0 or from 1e-20 to 1e\+20, not -1",
    ),
    (
        {"messages": [USER, BOT | {"weight": 1, "loss_weight": 2}]},
        "two_weights",
        r"\[1\] has different weights \(weight 1, loss",
    ),
    (
        {"messages": [USER, BOT | {"weight": 2, "loss_weight": 0}, USER, BOT]},
        "two_weights",
        r"\[1\] has different weights \(weight 2, loss_weight 0\)",
    ),
    ({"text": "t", "weight": 1, "loss_scale": 2}, "two_weights", "^the record has different weights"),
    (
        {"messages": [USER, BOT | {"weight": 2}, {"role": "assistant", "tool_calls": [CALL]}]},
        "broken_alternation",
        "another weight",
    ),
    ({"messages": [USER, BOT | {"weight": "1"}]}, "wrong_type", r"\[1\].weight"),
    ({"messages": [USER, BOT | {"name": 1}]}, "wrong_type", r"\[1\].name"),
    ({"instruction": 1, "output": "b"}, "wrong_type", "instruction"),
    ({"instruction": "a", "input": [], "output": "b"}, "wrong_type", "input"),
    ({"instruction": "a", "input": 0, "output": "b"}, "wrong_type", "input"),
    ({"instruction": "a", "output": None}, "wrong_type", "output"),
    ({"instruction": "a", "output": "b", "history": "c"}, "wrong_type", "history"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "wrong_type", r"history\[0\]"),
    ({"instruction": "a", "output": "b", "history": [["c", 1]]}, "wrong_type", r"history\[0\]\[1\]"),
    ({"prompt": 1, "completion": "b"}, "wrong_type", "prompt"),
    ({"prompt": "a", "completion": {}}, "wrong_type", "completion"),
    ({"prompt": "a", "completion": "b", "system": "s"}, "system_in_raw_text", "format question_answer"),
    ({"question": "a", "answer": 1}, "wrong_type", "answer"),
    ({"text": ["a"]}, "wrong_type", "text"),
    ({"text": "half \ud83d of a pair"}, "invalid_text", "text.*character 5"),
    (saying("half \ud83d"), "invalid_text", r"messages\[1\].content.*character 5"),
]


@pytest.mark.parametrize(("record", "reason", "message"), UNREADABLE)
def test_unreadable_records_name_the_reason(record, reason, message):
    with pytest.raises(RecordError, match=message) as caught:
        read_record(record)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "format_name", "missing"),
    [
        ({"text": "a"}, "messages", "no key messages"),
        ({"instruction": "a", "result": "b"}, "instruction", "no key output or response.*'instruction', 'result'"),
        ({"completion": "a"}, "prompt_completion", "no key prompt,"),
        ({"prompt": "a"}, "question_answer", "no key answer or response or output or solution or completion"),
        ({}, "text", "no key text"),
    ],
)
def test_a_named_format_says_which_key_is_missing(record, format_name, missing):
    with pytest.raises(RecordError, match=missing) as caught:
        read_record(record, format_name)
    assert caught.value.reason == "missing_key"


# -------------------------------------------------------------------------------------------------------------- fuzzing

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
surrogates = st.text(st.characters(categories=["Cs", "Lu"]), max_size=3)
json_values = st.recursive(
    scalars | surrogates,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = {key for record_format in RECORD_FORMATS.values() for group in record_format.keys for key in group}
RECORD_KEYS = st.sampled_from(sorted(KEYS | {"input", "history", "system", "tools", "id"}))
TURN_KEYS = ["role", "content", "from", "value", "train", "weight", "tool_calls", "function_call", *EXTRA_KEYS]
CALL_KEYS = ["name", "arguments", "function", "type", "id"]
roles = st.sampled_from(["system", "user", "human", "assistant", "gpt", "bot", "tool", "function_call", "observation"])
turn = st.dictionaries(st.sampled_from(TURN_KEYS), roles | json_values, max_size=5)
format_names = st.sampled_from(["auto", *RECORD_FORMATS])


def read_or_refuse(record, format_name):
    """Read a record; it must give a valid conversation, or an error of one line."""
    try:
        conversation = read_record(record, format_name)
    except RecordError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert len(str(refusal).splitlines()) == 1
        assert str(refusal).encode()
        assert refusal.reason.isidentifier()
        return None
    assert isinstance(conversation, Conversation)
    assert conversation.turns
    for turn in conversation.turns:
        turn.content.encode()
        json.dumps([turn.tool_calls, turn.extra], ensure_ascii=False).encode()
    json.dumps(conversation.tools, ensure_ascii=False).encode()
    assert conversation.raw or any(turn.learn and turn.role == "assistant" for turn in conversation.turns)
    return conversation


@given(st.dictionaries(RECORD_KEYS, json_values | st.lists(turn, max_size=4), max_size=6) | json_values, format_names)
@settings(max_examples=300, deadline=None)
def test_any_json_is_read_or_refused(record, format_name):
    read_or_refuse(record, format_name)


VALID = [
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
            {"role": "tool", "content": "3", "tool_call_id": "c1"},
            {"role": "assistant", "content": "a", "train": True, "reasoning_content": "r"},
        ],
        "tools": [TOOL],
    },
    {"chat_rounds": turns_of(("human", "a"), ("bot", "b"))},
    {
        "conversations": turns_of(
            ("human", "a"), ("function_call", json.dumps(READ_CALL)), ("tool", "b"), role="from", content="value"
        ),
        "system": "s",
        "tools": json.dumps([TOOL]),
    },
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"},
    {"prompt": "a", "completion": "b"},
    {"question": "a", "answer": "b"},
    {"text": "a"},
]


def paths_in(value, path=()):
    """Iterate over the paths of all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_mutated_records_are_read_or_refused(data):
    record = copy.deepcopy(data.draw(st.sampled_from(VALID)))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from([path for path in paths_in(record) if path] or [("x",)]))
        holder = record
        for key in parents:
            holder = holder[key]
        change = data.draw(st.sampled_from(["replace", "remove", "add", "copy"]))
        if change == "remove" and (last in holder if isinstance(holder, dict) else True):
            del holder[last]
        elif change == "add" and isinstance(holder, dict):
            keys = st.sampled_from([*TURN_KEYS, *CALL_KEYS]) | RECORD_KEYS
            holder[data.draw(keys)] = data.draw(json_values)
        elif change == "copy" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        else:
            holder[last] = data.draw(json_values | roles)
    read_or_refuse(record, data.draw(st.sampled_from(["auto", "auto", *RECORD_FORMATS])))


def test_the_records_that_are_mutated_are_valid():
    assert all(read_or_refuse(record, "auto") for record in VALID)


# a question with a placeholder of a picture is refused
texts = st.text(max_size=30).filter(lambda text: not {"<image>", "<video>", "<audio>"} & {text.strip()})


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), texts, st.sampled_from(list(RECORD_FORMATS)))
@settings(deadline=None)
def test_content_comes_through_as_it_is(rounds, system, format_name):
    (question, answer), earlier = rounds[-1], rounds[:-1]
    names = {"messages": ("user", "assistant"), "chat_rounds": ("human", "bot"), "conversations": ("human", "gpt")}
    names["conversation"] = names["conversations"]
    expected = [text for pair in rounds for text in pair]
    if format_name in names:
        keys = {"role": "from", "content": "value"} if format_name.startswith("conversation") else {}
        user, bot = names[format_name]
        turns = turns_of(*(turn for one, other in rounds for turn in ((user, one), (bot, other))), **keys)
        record = {format_name: [*turns_of(("system", system), **keys), *turns]}
        expected = [system, *expected]
    else:
        record, expected = {
            "instruction": (
                {"instruction": question, "output": answer, "history": [list(pair) for pair in earlier]},
                expected,
            ),
            "prompt_completion": ({"prompt": question, "completion": answer}, [question, answer]),
            "question_answer": ({"question": question, "answer": answer}, [question, answer]),
            "text": ({"text": question}, [question]),
        }[format_name]
    record = json.loads(json.dumps(record))
    for conversation in (read_record(record), read_record(record, format_name)):
        assert [turn.content for turn in conversation.turns] == expected

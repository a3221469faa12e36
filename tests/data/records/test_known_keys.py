"""Keys beside the text: read with their meaning, refused by name, or counted; never passed over silently."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_megatron.data.records.conversation import EXTRA_KEYS, RecordError
from mft_megatron.data.records.ignored_keys import parse_ignored_keys, without_keys
from mft_megatron.data.records.known_keys import FLAGS, PASSAGES, REFUSED, REFUSED_IN_TURNS, SYSTEM, TOOLS, WEIGHTS
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.records.reading import Reading
from mft_megatron.data.records.record_formats import RECORD_FORMATS, read_record
from mft_megatron.errors import InputError

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CALL = {"name": "f", "arguments": {"x": 1}}
CALLING = {"from": "function_call", "value": json.dumps(CALL)}
SEEN = {"from": "observation", "value": "r"}
BARE = {"name": "f", "description": "d", "parameters": {"type": "object"}}
SENT = {"type": "function", "function": BARE}


def read(record, ignored=()):
    """Roles with texts, weights of answers, calls, tools, and counts of a record; or the reason of its refusal."""
    notes = RecordNotes()
    before = copy.deepcopy(record)
    try:
        conversation = read_record(record, "auto", notes, ignored)
    except RecordError as error:
        return error.reason, str(error)
    finally:
        assert record == before
    return (
        [(turn.role, turn.content) for turn in conversation.turns],
        [
            turn.learn * turn.weight * conversation.weight
            for turn in conversation.turns
            if turn.role in ("assistant", "completion")
        ],
        [call for turn in conversation.turns for call in turn.tool_calls],
        list(conversation.tools),
        dict(notes.unread_keys),
        dict(notes.kinds),
    )


def chat(*texts, learn=None, calls=(), tools=(), unread=(), kinds=()):
    """The result of :func:`read` for a chat of texts of user and assistant by turns, or of roles with texts."""
    turns = [text if isinstance(text, tuple) else (("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    learn = [True] * sum(role == "assistant" for role, _ in turns) if learn is None else learn
    return turns, learn, list(calls), list(tools), dict.fromkeys(unread, 1), dict(kinds)


def messages(*turns, **more):
    return {"messages": list(turns), **more}


SYSTEM_Q_A = ("system", "s"), ("user", "q"), ("assistant", "a")
READ = [
    # MFTCoder
    (
        {
            "id": 0,
            "data_name": "x",
            "chat_rounds": [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}],
        },
        chat("q", "a", unread=["id", "data_name"]),
    ),
    (
        {
            "chat_rounds": [
                {"role": "human", "content": "q", "chat_round_id": 0},
                {"role": "bot", "content": "a", "chat_round_id": 1},
            ]
        },
        chat("q", "a", unread=["chat_rounds[].chat_round_id"]),
    ),
    # ms-swift
    (
        {"query": "q2", "response": "a2", "history": [["q", "a"]], "system": "s"},
        chat(*SYSTEM_Q_A, ("user", "q2"), ("assistant", "a2")),
    ),
    (
        {"messages": [USER, BOT | {"loss": False}, USER, BOT | {"loss": True}], "channel": "x"},
        chat("q", "a", "q", "a", learn=[False, True], unread=["channel"]),
    ),
    (
        {
            "tools": json.dumps([SENT]),
            "messages": [
                USER,
                {"role": "tool_call", "content": json.dumps(CALL)},
                {"role": "tool_call", "content": json.dumps(CALL)},
                {"role": "tool_response", "content": "r"},
                {"role": "tool_response", "content": "r2"},
                BOT,
            ],
        },
        chat(
            ("user", "q"),
            ("assistant", ""),
            ("tool", "r"),
            ("tool", "r2"),
            ("assistant", "a"),
            calls=[CALL, CALL],
            tools=[SENT],
        ),
    ),
    (
        {"messages": [USER, BOT | {"loss_scale": 0.3}, USER | {"weight": 0}, BOT | {"loss": True}]},
        chat("q", "a", "q", "a", learn=[0.3, 1]),
    ),
    (
        messages(USER, BOT | {"weight": 0.5, "loss_weight": 0.5}, USER, BOT | {"weight": 4, "train": False}, weight=3),
        chat("q", "a", "q", "a", learn=[1.5, False]),
    ),
    (messages(USER, BOT, weight=0.25, loss_scale=0.25, train=True), chat("q", "a", learn=[0.25])),
    (
        {"question": "q", "answer": "a", "history": [["q", "a"]], "loss_weight": 2},
        chat("q", "a", "q", "a", learn=[2, 2]),
    ),
    ({"instruction": "q", "output": "a", "weight": 1e-20}, chat("q", "a", learn=[1e-20])),
    ({"input": "q", "output": "a", "weight": 1e20}, chat("q", "a", learn=[1e20])),
    ({"chat_rounds": [USER, BOT | {"weight": 3}]}, chat("q", "a", learn=[3])),
    ({"conversation": [HUMAN, GPT | {"weight": 0.5}], "weight": 2}, chat("q", "a", learn=[1])),
    (
        {"conversations": [HUMAN, GPT | {"weight": 2}, CALLING | {"weight": 2}, SEEN, GPT]},
        chat(("user", "q"), ("assistant", "a"), ("tool", "r"), ("assistant", "a"), learn=[2, 1], calls=[CALL]),
    ),
    (
        {"prompt": [USER, BOT | {"weight": 5}, USER], "completion": [BOT | {"weight": 5}], "weight": 0.5},
        chat("q", "a", "q", "a", learn=[False, 2.5]),
    ),
    ({"prompt": "p", "completion": "c", "weight": 0.5}, chat(("prompt", "p"), ("completion", "c"), learn=[0.5])),
    ({"text": "t", "loss_scale": 2}, chat(("completion", "t"), learn=[2])),
    (messages(USER | {"weight": 0.5}, BOT), chat("q", "a", kinds={"marked_turn_not_learnt": 1})),
    ({"messages": [USER, BOT], "images": [], "objects": {}}, chat("q", "a", unread=["objects"])),
    # LLaMA-Factory
    ({"instruction": "q", "input": "", "output": "a", "system": "s"}, chat(*SYSTEM_Q_A)),
    ({"instruction": "q", "input": "i", "output": "a", "kto_tag": True}, chat("q\n\ni", "a")),
    (
        {"conversations": [HUMAN, CALLING, SEEN, GPT], "tools": json.dumps([BARE]), "system": "s"},
        chat(
            ("system", "s"),
            ("user", "q"),
            ("assistant", ""),
            ("tool", "r"),
            ("assistant", "a"),
            calls=[CALL],
            tools=[SENT],
        ),
    ),
    # axolotl
    (
        {"conversations": [HUMAN, GPT | {"weight": 0}, HUMAN | {"weight": None}, GPT | {"weight": 1}]},
        chat("q", "a", "q", "a", learn=[False, True]),
    ),
    (
        {"messages": [USER | {"training": False}, BOT | {"training": False}, USER, BOT | {"training": True}]},
        chat("q", "a", "q", "a", learn=[False, True]),
    ),
    (
        {"messages": [USER | {"training": True}, BOT]},
        chat("q", "a", kinds={"marked_turn_not_learnt": 1}),
    ),
    # TRL
    (
        {"prompt": [{"role": "system", "content": "s"}, USER], "completion": [BOT], "chat_template_kwargs": {}},
        chat(*SYSTEM_Q_A),
    ),
    ({"prompt": [USER, BOT, USER], "completion": [BOT]}, chat("q", "a", "q", "a", learn=[False, True])),
    ({"prompt": [USER], "completion": [BOT], "label": True, "tools": [BARE]}, chat("q", "a", tools=[SENT])),
    ({"messages": [USER, BOT], "label": "True", "kto_tag": "true"}, chat("q", "a")),
    # NeMo
    (
        {
            "system": "s",
            "mask": "User",
            "type": "VALUE_TO_TEXT",
            "conversations": [
                {"from": "User", "value": "q", "label": None},
                {"from": "Assistant", "value": "a", "label": "quality:4"},
            ],
        },
        chat(*SYSTEM_Q_A, unread=["type", "conversations[].label"]),
    ),
    ({"input": "q", "output": "a", "mask": False}, chat("q", "a")),
    ({"input": "q", "output": "a", "mask": "System, human user,TOOL"}, chat("q", "a")),
    # OpenAI
    (
        {
            "messages": [
                {"role": "developer", "content": "s"},
                USER | {"name": "ann"},
                BOT | {"weight": 0, "refusal": None, "audio": None, "tool_calls": []},
                USER,
                BOT | {"weight": 1, "annotations": [1]},
            ],
            "parallel_tool_calls": False,
        },
        chat(
            *SYSTEM_Q_A,
            ("user", "q"),
            ("assistant", "a"),
            learn=[False, True],
            unread=["parallel_tool_calls", "messages[].annotations"],
            kinds={"developer_turn": 1},
        ),
    ),
    ({"messages": [USER, BOT], "tools": [{**BARE, "type": "function"}]}, chat("q", "a", tools=[SENT])),
    (
        {"messages": [{"role": "system", "content": "s", "train": True}, USER, BOT]},
        chat(*SYSTEM_Q_A, kinds={"marked_turn_not_learnt": 1}),
    ),
    # what is declared as no function is sent as it is
    (
        {"messages": [USER, BOT], "tools": [{**BARE, "type": "custom"}]},
        chat("q", "a", tools=[{**BARE, "type": "custom"}]),
    ),
    ({"messages": [USER, BOT], "functions": [BARE], "tools": [SENT]}, chat("q", "a", tools=[SENT])),
    (
        {"messages": [{"role": "system", "content": "s", "functions": [BARE]}, USER, BOT]},
        chat(*SYSTEM_Q_A, tools=[SENT]),
    ),
    ({"messages": [USER, BOT], "tools": [{"type": "web_search"}]}, chat("q", "a", tools=[{"type": "web_search"}])),
    # Dolly, SQuAD, Orca and others
    ({"instruction": "q", "context": "", "response": "a", "category": "x"}, chat("q", "a", unread=["category"])),
    ({"question": "q", "context": "c", "answer": "a"}, chat("q\n\nc", "a")),
    ({"instruction": "i", "input": "q", "answer": "a"}, chat("i\n\nq", "a")),
    ({"instruction": "i", "input": "p", "passage": "c", "output": "a"}, chat("i\n\np\n\nc", "a")),
    ({"system_message": "s", "system": "s", "question": "q", "answer": "a"}, chat(*SYSTEM_Q_A)),
    # several system turns, of which the one beside the turns may be repeated
    ({"system": "s", "messages": [{"role": "system", "content": "s"}, USER, BOT]}, chat(*SYSTEM_Q_A)),
    (
        {
            "system_prompt": "s",
            "messages": [
                {"role": "system", "content": "s2"},
                USER,
                BOT,
                {"role": "system", "content": "s3"},
                USER,
                BOT,
            ],
        },
        chat(("system", "s"), ("system", "s2"), *SYSTEM_Q_A[1:], ("system", "s3"), *SYSTEM_Q_A[1:]),
    ),
    (
        {"system": "s", "messages": [{"role": "system", "content": "s", "name": "n"}, USER, BOT]},
        chat(*SYSTEM_Q_A),
    ),
    ({"instruction": "", "input": "q", "answer": "a"}, chat("q", "a")),
    # text before calls
    (
        {"messages": [USER, BOT, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "r"}, BOT]},
        chat(("user", "q"), ("assistant", "a"), ("tool", "r"), ("assistant", "a"), calls=[CALL]),
    ),
    # names of other shapes
    ({"problem": "q", "solution": "a", "source": "x"}, chat("q", "a", unread=["source"])),
    ({"problem": "q", "answer": "a", "solution": None}, chat("q", "a")),
    ({"question": "q", "solution": "a", "problem": "p"}, chat("q", "a", unread=["problem"])),
    ({"question": "q", "solution": "s", "answer": "a"}, chat("q", "a", unread=["solution"])),
    ({"problem": "q", "input": "i", "output": "a"}, chat("q\n\ni", "a")),
    ({"instruction": "q", "answer": "a"}, chat("q", "a")),
    ({"instruction": "q", "completion": "a", "input": None}, chat("q", "a")),
    ({"instruction": "i", "question": "q", "answer": "a", "context": "c"}, chat("i\n\nq\n\nc", "a")),
    ({"instruction": "i", "problem": "q", "solution": "a"}, chat("i\n\nq", "a")),
    ({"conversation": [HUMAN, {"from": "bing", "value": "a"}], "system": "s"}, chat(*SYSTEM_Q_A)),
    ({"conversation": [USER, BOT]}, chat("q", "a")),
    ({"conversation": "A: hello", "question": "q", "answer": "a"}, chat("q", "a", unread=["conversation"])),
    ({"conversations": [HUMAN, GPT | {"from": "chatgpt"}, HUMAN, GPT | {"from": "bard"}]}, chat("q", "a", "q", "a")),
    # calls that are written in the text (Hermes, ToolBench, ToolACE)
    (
        {
            "conversations": [
                HUMAN,
                {"from": "gpt", "value": "<tool_call>f</tool_call>"},
                {"from": "tool", "value": "r"},
                GPT,
            ]
        },
        chat(
            "q",
            "<tool_call>f</tool_call>",
            ("tool", "r"),
            ("assistant", "a"),
            kinds={"tool_turn_without_call": 1},
        ),
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "q"},
                {"from": "assistant", "value": "a"},
                {"from": "function", "value": "r"},
                {"from": "assistant", "value": "a"},
                {"from": "function", "value": "r"},
            ]
        },
        chat(
            *SYSTEM_Q_A,
            ("tool", "r"),
            ("assistant", "a"),
            ("tool", "r"),
            kinds={"tool_turn_without_call": 2},
        ),
    ),
    (
        {"messages": [USER, BOT, {"role": "tool", "content": "r"}, {"role": "tool", "content": "r"}, BOT, USER, BOT]},
        chat(
            *SYSTEM_Q_A[1:],
            ("tool", "r"),
            ("tool", "r"),
            ("assistant", "a"),
            *SYSTEM_Q_A[1:],
            kinds={"tool_turn_without_call": 1},
        ),
    ),
    # tags in a question that ask for no picture
    ({"question": "How does <video> work?", "answer": "a"}, chat("How does <video> work?", "a")),
    ({"question": "Close it:\n<audio>\n</audio>", "answer": "a"}, chat("Close it:\n<audio>\n</audio>", "a")),
    ({"question": "Go on:\n<video>\n  <source", "answer": "a"}, chat("Go on:\n<video>\n  <source", "a")),
    ({"question": "<image >\n<image/> x<image>y", "answer": "a"}, chat("<image >\n<image/> x<image>y", "a")),
    # keys of parts and of calls
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "cache_control": 1}]}, BOT]},
        chat("q", "a", unread=["messages[].content[].cache_control"]),
    ),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"index": 0, "function": {**CALL, "strict": True}}]}]},
        chat(
            "q", "", calls=[CALL], unread=["messages[].tool_calls[].index", "messages[].tool_calls[].function.strict"]
        ),
    ),
]


@pytest.mark.parametrize(("record", "expected"), READ)
def test_known_keys_are_read_and_others_counted(record, expected):
    assert read(record) == expected
    assert read(json.loads(json.dumps(record))) == expected


REFUSALS = [
    (messages(USER, BOT, images=["1.jpg"]), "unsupported_content", "images"),
    (messages(USER, BOT, image="1.jpg"), "unsupported_content", "image"),
    ({"conversations": [HUMAN, GPT], "videos": ["v.mp4"]}, "unsupported_content", "videos"),
    ({"text": "t", "audio": {"path": "x.wav"}}, "unsupported_content", "audio"),
    (messages(USER | {"images": ["x"]}, BOT), "unsupported_content", "messages[].images"),
    (messages(USER, BOT, label=False), "unwanted_answer", "label"),
    ({"prompt": "p", "completion": "c", "label": False}, "unwanted_answer", "label"),
    (messages(USER, BOT, label="False"), "unwanted_answer", "label"),
    ({"instruction": "q", "output": "a", "kto_tag": " false"}, "unwanted_answer", "kto_tag"),
    ({"instruction": "q", "output": "a", "kto_tag": False}, "unwanted_answer", "kto_tag"),
    (messages(USER, BOT | {"label": False}), "unwanted_answer", "messages[].label"),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference_pair", "chosen"),
    ({"chosen": [USER, BOT], "rejected": [USER, BOT]}, "preference_pair", "chosen"),
    (messages(USER, BOT, rejected_response="r"), "preference_pair", "rejected_response"),
    (messages(USER, BOT, chat_template_kwargs={"x": 1}), "unsupported_key", "chat_template_kwargs"),
    (messages(USER, BOT, context="c"), "unsupported_key", "context"),
    (messages(USER, BOT, documents=[{"text": "d"}]), "unsupported_key", "documents"),
    ({"question": "q", "answer": "a", "documents": ["d"]}, "unsupported_key", "documents"),
    ({"instruction": "q", "output": "a", "documents": ["d"]}, "unsupported_key", "documents"),
    ({"prompt": "p", "completion": "c", "documents": ["d"]}, "unsupported_key", "documents"),
    (messages(USER, BOT, history=[["a", "b"]]), "unsupported_key", "history"),
    ({"prompt": [USER], "completion": [BOT], "context": "c"}, "unsupported_key", "context"),
    (messages(USER, BOT | {"refusal": "No."}), "unsupported_key", "messages[].refusal"),
    (messages(USER, BOT | {"train_detail": [{"train": False}]}), "unsupported_key", "messages[].train_detail"),
    (messages(USER, BOT | {"loss": 0.5}), "unsupported_weight", "messages[].loss"),
    (messages(USER, BOT | {"loss_scale": -2}), "unsupported_weight", "messages[].loss_scale"),
    (messages(USER, BOT | {"weight": float("nan")}), "unsupported_weight", "messages[].weight"),
    (messages(USER, BOT | {"weight": float("inf")}), "unsupported_weight", "messages[].weight"),
    (messages(USER, BOT | {"loss_weight": 1e-40}), "unsupported_weight", "messages[].loss_weight"),
    (messages(USER, BOT | {"loss_weight": 10**400}), "unsupported_weight", "messages[].loss_weight"),
    (messages(USER, BOT | {"weight": "0.5"}), "wrong_type", "messages[].weight"),
    (messages(USER, BOT, weight=[0.5]), "wrong_type", "weight"),
    (messages(USER, BOT | {"loss": "false"}), "wrong_type", "messages[].loss"),
    (messages(USER, BOT | {"mask": "User"}), "wrong_type", "messages[].mask"),
    (messages(USER, BOT, weight=-0.3), "unsupported_weight", "weight"),
    ({"text": "t", "loss_scale": float("-inf")}, "unsupported_weight", "loss_scale"),
    ({"question": "q", "answer": "a", "weight": 0}, "no_learned_turn", "weight"),
    (messages(USER, BOT, skip=0.3), "unsupported_weight", "skip"),
    (messages(USER, BOT, loss=False), "no_learned_turn", "loss"),
    ({"question": "q", "answer": "a", "training": 0}, "no_learned_turn", "training"),
    ({"prompt": "p", "completion": "c", "mask": True}, "no_learned_turn", "mask"),
    (messages(USER, BOT, mask="Assistant"), "no_learned_turn", "mask"),
    (messages(USER | {"tools": [BARE]}, BOT), "invalid_tools", "messages[].tools"),
    ({"problem": "q", "solution": "s", "answer": "a"}, "two_answers", "solution"),
    ({"problem": "q", "solution": "s", "output": "a", "input": "i"}, "two_answers", "solution"),
]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("question", ["instruction", "question", "input"])
def test_reasoning_beside_question_and_answer_is_that_of_the_answer(key, question):
    record = {question: "q", "output": "a", key: "r", "history": [["q", "a"]]}
    notes = RecordNotes()
    turns = read_record(record, "auto", notes).turns
    assert [turn.extra for turn in turns] == [{}, {}, {}, {key: "r"}]
    assert not notes.unread_keys
    assert read_record({question: "q", "output": "a", key: ""}).turns[1].extra == {}
    assert read({question: "q", "output": "a", key: True})[0] == "wrong_type"
    assert read({"prompt": "p", "completion": "c", key: "r"})[4] == {key: 1}


@pytest.mark.parametrize("key", ["instruction", "history", "context", "reasoning"])
def test_text_beside_a_question_and_an_answer_that_are_lists_of_turns_is_refused(key):
    record = {"question": [USER], "answer": [BOT]}
    assert read(record) == chat("q", "a")
    assert read({**record, key: ["x"]})[0] == "unsupported_key"


SAYS_LEARNT = {
    **dict.fromkeys(("train", "training", "trainable", "train_on_turn", "learn", "loss", "loss_weight"), True),
    **dict.fromkeys(("loss_scale", "weight"), True),
    **dict.fromkeys(("mask", "masked", "is_masked", "ignore", "no_train", "skip"), False),
}


@pytest.mark.parametrize("flag", sorted({*FLAGS, *WEIGHTS, *SAYS_LEARNT}))
@pytest.mark.parametrize("value", [True, False, 1, 0])
def test_each_flag_decides_about_its_turn_and_refuses_a_record_that_it_excludes(flag, value):
    learnt = bool(value) is SAYS_LEARNT[flag]
    assert read(messages(USER, BOT | {flag: value}, USER, BOT)) == chat("q", "a", "q", "a", learn=[learnt, True])
    whole = read(messages(USER, BOT, **{flag: value}))
    assert whole == chat("q", "a") if learnt else whole[0] == "no_learned_turn"


@pytest.mark.parametrize(("record", "reason", "path"), REFUSALS)
def test_known_keys_that_cannot_be_honoured_refuse_the_record_by_name(record, reason, path):
    found, message = read(record)
    assert found == reason
    assert message.endswith(f"--ignore-keys {path} reads records as if they did not have it")
    if "chosen" not in record:
        assert read(record, (path,))[4] == {path: 1}


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        (messages(USER, BOT, system="s", system_prompt="other"), "two_system_texts", "system and system_prompt"),
        (messages(USER, BOT, tools=[BARE], functions=[BARE, BARE]), "invalid_tools", "tools and functions"),
        (
            messages({"role": "system", "content": "s", "tools": [BARE]}, USER, BOT, tools=[{**BARE, "name": "g"}]),
            "invalid_tools",
            r"tools and messages\[\]\.tools declare",
        ),
        # the third place of three
        (
            messages(
                {"role": "system", "content": "s", "tools": [BARE, BARE]}, USER, BOT, tools=[BARE], functions=[BARE]
            ),
            "invalid_tools",
            r"tools and messages\[\]\.tools declare",
        ),
        (messages({"role": "system", "content": "s", "tools": "f(x)"}, USER, BOT), "invalid_tools", r"messages\[0\]"),
        ({"prompt": "p", "completion": "c", "tools": [BARE]}, "unsupported_key", "raw text .*tools"),
        ({"prompt": "p", "completion": "c", "history": [["a", "b"]]}, "unsupported_key", "raw text .*earlier rounds"),
        ({"prompt": "p", "completion": "c", "context": "c"}, "unsupported_key", "raw text .*a passage"),
        ({"prompt": "p", "completion": "c", "system_prompt": "s"}, "system_in_raw_text", "system_prompt"),
        ({"messages": json.dumps([USER, BOT])}, "wrong_type", "messages must be a list of turns .*, not text; write"),
        ({"prompt": "p", "completion": [BOT]}, "wrong_type", "prompt and completion must both"),
        ({"prompt": [USER], "completion": "c"}, "wrong_type", "prompt and completion must both"),
        (messages({"role": "user", "content": "<image>\nWho?"}, BOT), "unsupported_content", "placeholder <image>"),
        ({"instruction": "Who?\n<image>", "output": "a"}, "unsupported_content", "placeholder <image>"),
        ({"question": "1\n <image> left\n3", "answer": "a"}, "unsupported_content", "placeholder <image>"),
        ({"question": "1\nleft: <image> \r\n3", "answer": "a"}, "unsupported_content", "placeholder <image>"),
        ({"question": " <audio> What is it?", "answer": "a"}, "unsupported_content", "placeholder <audio>"),
        ({"instruction": "Who?", "input": "<video>", "output": "a"}, "unsupported_content", "placeholder <video>"),
        (
            messages(USER, BOT | {"loss": False}, {"role": "assistant", "tool_calls": [CALL]}),
            "broken_alternation",
            "flags exclude a part",
        ),
        (
            messages(USER, BOT | {"name": "x"}, {"role": "assistant", "tool_calls": [CALL], "name": "y"}),
            "broken_alternation",
            "another name",
        ),
        (messages(USER, BOT | {"tool_calls": [CALL], "function_call": CALL}), "invalid_tool_call", "both"),
        (
            messages(USER, BOT | {"loss": False, "mask": None}),
            "no_learned_turn",
            "messages: loss in every assistant",
        ),
        (
            {"prompt": [USER, BOT, USER], "completion": [{"role": "user", "content": "q"}]},
            "broken_alternation",
            "the answer between them is missing",
        ),
        (
            {"prompt": [USER, BOT], "completion": [USER]},
            "no_learned_turn",
            "prompt and completion: no assistant turn in completion, so",
        ),
        (messages(BOT), "broken_alternation", "the chat begins with an answer; put its question before it"),
        (messages(USER, USER, BOT), "broken_alternation", "the answer between them is missing"),
        (messages(USER, BOT, BOT), "broken_alternation", "join the two answers"),
        (messages(USER, {"role": "tool", "content": "r"}, BOT), "broken_alternation", "the call is missing"),
        (messages(USER, {"role": "assistant", "tool_calls": [CALL]}, BOT), "broken_alternation", "tool's answer"),
        (messages({"role": "system", "content": "s"}, BOT), "broken_alternation", "question is missing"),
    ],
)
def test_contradictions_and_wrong_orders_name_the_cause(record, reason, message):
    with pytest.raises(RecordError, match=message) as caught:
        read_record(record)
    assert caught.value.reason == reason


# ------------------------------------------------------------------------------------------------------ nothing is lost

RECORDS = [record for record, _ in READ]
KNOWN = {
    *(key for one in RECORD_FORMATS.values() for group in one.keys_if_named or one.keys for key in group),
    *("history", "documents", "role", "content", "from", "value", "tool_calls", "function_call", "arguments", "name"),
    *(*FLAGS, *WEIGHTS, *REFUSED, *REFUSED_IN_TURNS, *SYSTEM, *PASSAGES, *TOOLS, *EXTRA_KEYS, "label", "kto_tag"),
    "id",
    "type",
    *("function", "text"),
}
unknown_keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=".[],"), min_size=1).filter(
    lambda key: key not in KNOWN and key == key.strip()
)
values = st.text(min_size=1) | st.integers() | st.lists(st.integers(), max_size=2) | st.just({}) | st.booleans()


def holders(value, path=""):
    """Objects of a record whose keys have meanings, with the paths of their keys; declarations are kept whole."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            if key not in ("tools", "functions", "arguments", "objects", "chat_template_kwargs"):
                yield from holders(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from holders(item, f"{path}[]")


@given(st.sampled_from(RECORDS), st.data())
@settings(deadline=None, max_examples=300)
def test_any_unknown_key_is_counted_wherever_it_is(record, data):
    record = json.loads(json.dumps(record))
    before = read(record)
    path, holder = data.draw(st.sampled_from(list(holders(record))))
    key = data.draw(unknown_keys.filter(lambda key: key not in holder))
    holder[key] = data.draw(values)
    path = f"{path}.{key}" if path else key
    assert read(record) == (*before[:4], before[4] | {path: 1}, before[5])
    # read as if it were not there, but counted
    assert read(record, (path,)) == (*before[:4], before[4] | {path: 1}, before[5])


@pytest.mark.parametrize(
    ("key", "path"), [("\ud800", "\\ud800"), ("", ""), ("\n", "\n"), ("é\U0001f600", "é\U0001f600")]
)
def test_odd_keys_are_counted_by_paths_that_can_be_written(key, path):
    assert read(messages(USER, BOT, **{key: 1}))[4] == {path: 1}
    assert read(messages(USER | {key: 1}, BOT))[4] == {f"messages[].{path}": 1}


@given(st.sampled_from(RECORDS), st.sampled_from(sorted(KNOWN)), values, st.data())
@settings(deadline=None, max_examples=500)
def test_any_known_key_changes_the_record_or_is_counted_or_refused(record, key, value, data):
    record = json.loads(json.dumps(record))
    before = read(record)
    _, holder = data.draw(st.sampled_from(list(holders(record))))
    if key in holder:
        return
    holder[key] = value
    after = read(record)
    says_what_is_done_anyway = key in (*FLAGS, *WEIGHTS, "label", "kto_tag") and isinstance(value, bool | int)
    empty = not value.strip() if isinstance(value, str) else not value
    named_in_calls = key in ("id", "type", "name", "arguments") or (key in EXTRA_KEYS)
    assert after != before or says_what_is_done_anyway or empty or named_in_calls


# -------------------------------------------------------------------------------------------------------- --ignore-keys


@pytest.mark.parametrize(
    ("paths", "left", "counted"),
    [
        ("a", {"b.c": 1, "d": {"a": 3}, "e": [{"a": 4, "f": 5}, 6, {"f": 7}]}, ("a",)),
        ("b.c", {"a": 2, "d": {"a": 3}, "e": [{"a": 4, "f": 5}, 6, {"f": 7}]}, ("b.c",)),
        ("d.a,e[].a", {"a": 2, "b.c": 1, "d": {}, "e": [{"f": 5}, 6, {"f": 7}]}, ("d.a", "e[].a")),
        ("x,e.a,d[].a,e[].x,a.b", {"a": 2, "b.c": 1, "d": {"a": 3}, "e": [{"a": 4, "f": 5}, 6, {"f": 7}]}, ()),
    ],
)
def test_ignored_keys_are_removed_and_counted(paths, left, counted):
    record = {"a": 2, "b.c": 1, "d": {"a": 3}, "e": [{"a": 4, "f": 5}, 6, {"f": 7}]}
    reading = Reading()
    assert without_keys(record, parse_ignored_keys(paths), reading) == left
    assert reading.unread == counted


@pytest.mark.parametrize("text", ["", "a,", ",", "a,,b", "a,a"])
def test_ignored_keys_that_cannot_be_read_are_refused(text):
    with pytest.raises(InputError, match="--ignore-keys"):
        parse_ignored_keys(text)


def test_a_key_that_is_ignored_is_not_read():
    record = {"text": "t", "messages": [USER, BOT | {"loss": False}]}
    assert read(record, ("messages",))[0] == [("completion", "t")]
    assert read(record, ("messages[].loss",)) == chat("q", "a", unread=["messages[].loss", "text"])

"""Batches become the ids and masks that encoding segment by segment gives, with every tokenizer and backend."""

import dataclasses
import gzip
import json
import pickle
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft_megatron.data.chat_templates.builtin_formats import BuiltInFormat
from mft_megatron.data.chat_templates.format_names import shown_format
from mft_megatron.data.chat_templates.formats import chat_format
from mft_megatron.data.preprocessing import batched_texts
from mft_megatron.data.preprocessing.encoding import Encoder, TaskEncoding
from mft_megatron.data.preprocessing.workers import Workers
from mft_megatron.data.records.conversation import RecordError
from mft_megatron.data.records.fim import Fim, FimFamily
from mft_megatron.data.records.record_formats import read_record
from mft_megatron.data.records.segments import Segment
from mft_megatron.data.tasks.record_batches import RecordBatch
from mft_megatron.data.tokenizers import backends
from mft_megatron.data.tokenizers.backends import BackendMismatch, FastBackend
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.errors import InputError
from tests.data.chat_templates.templates import QWEN2, QWEN3, TEMPLATES, save_tokenizer
from tests.data.conftest import SOURCES, TASKS, functions, space_before_texts


def naive(tokenizer, segments, chat=False):
    """Ids and mask of one sample: consecutive segments of one kind are concatenated, then encoded one by one."""
    merged = []
    for segment in segments:
        if segment.special and tokenizer.token_id(segment.text) is None:
            segment = segment._replace(special=False)
        if merged and not segment.special and merged[-1][1:] == segment[1:]:
            segment = segment._replace(text=merged.pop().text + segment.text)
        merged.append(segment)
    ids, mask = [], []
    # none of these tokenizers adds BOS; of those that write a space before a text, one writes it after each token, too
    opens = chat
    for text, supervised, special, markup, begins, _ in merged:
        if begins or (opens and text and not (special or supervised)):
            text = space_before_texts(tokenizer) + text
        if text:
            opens = chat and special and tokenizer.type == "HuggingFaceTokenizer"
        of_segment = [tokenizer.token_id(text)] if special else tokenizer.encode_batch([text], markup)[0]
        ids += of_segment
        mask += [int(supervised)] * len(of_segment)
    return ids, mask


def naive_batch(tokenizer, plan, records):
    read = [read_record(record, plan.record_format) for record in records]
    samples = [naive(tokenizer, plan.style.segments(one), chat=not one.raw) for one in read]
    return [(ids, mask) for ids, mask in samples if any(mask[1:])]


def samples_of(encoded):
    assert (encoded.ids.dtype, encoded.mask.dtype, encoded.lengths.dtype) == (np.int32, np.uint8, np.int32)
    assert encoded.lengths.sum() == len(encoded.ids) == len(encoded.mask)
    ends = np.cumsum(encoded.lengths)
    return [
        (encoded.ids[end - length : end].tolist(), encoded.mask[end - length : end].tolist())
        for end, length in zip(ends, encoded.lengths, strict=True)
    ]


def encode(tokenizer, records, plan=None, **options):
    plan = plan or TaskEncoding(chat_format("mftcoder", tokenizer), **options)
    lines = [record if isinstance(record, bytes | dict) else record.encode() for record in records]
    return Encoder(tokenizer, {"task": plan}).encode("task", RecordBatch("file", 1, lines))


@pytest.mark.parametrize("template", ["chatml", "mftcoder"])
@pytest.mark.parametrize("task", TASKS)
def test_real_text_is_encoded_like_its_segments(both, template, task):
    records = TASKS[task](functions())
    if template == "chatml" and task in ("chat", "rounds") and both[0].token_id("<|im_end|>") is None:
        template = "mftcoder"
    plan = TaskEncoding(chat_format(template, both[0]))
    expected = naive_batch(both[0], plan, records)
    for tokenizer in both:
        encoded = encode(tokenizer, map(json.dumps, records), plan)
        assert samples_of(encoded) == expected
        assert encoded.records == len(records) == len(encoded.lengths) + len(encoded.drops)


# a format whose segments are what a test says
class Given(BuiltInFormat):
    def segments(self, conversation, notes=None):
        return [Segment(*segment) for segment in json.loads(conversation.turns[0].content)]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["", " ", "  x", "\n", "</s>", "<|im_end|>", "def f(x):\n    return", "x" * 40]
)
segment = st.tuples(text, st.booleans(), st.just(False), st.booleans()) | st.tuples(
    st.sampled_from(["</s>", "<|im_start|>", "<|endoftext|>", "<s>", "unheard of"]), st.booleans(), st.just(True)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.lists(st.lists(segment, max_size=6), max_size=5), st.integers(1, 3))
def test_any_segments_are_encoded_one_by_one(both, samples, kept):
    plan = TaskEncoding(Given("mftcoder", {}, both[0].end_of_text))
    expected = [naive(both[0], [Segment(*segment) for segment in sample]) for sample in samples]
    useful = [any(mask[1:]) for _, mask in expected]
    for tokenizer in both:
        encoder = Encoder(tokenizer, {"task": plan})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batched_texts, "_KEPT", kept)  # short texts come and go
            for _ in range(2):  # the second time with texts from the first
                lines = [json.dumps({"text": json.dumps(sample)}).encode() for sample in samples]
                encoded = encoder.encode("task", RecordBatch("file", 5, lines))
                assert samples_of(encoded) == [sample for sample, use in zip(expected, useful, strict=True) if use]
                assert [drop.line for drop in encoded.drops] == [5 + n for n, use in enumerate(useful) if not use]
                assert {drop.reason for drop in encoded.drops} <= {"no_supervised_token"}


@pytest.mark.parametrize("order", [1, -1])
def test_short_texts_are_kept_separately_with_and_without_markup(both, order):
    end = both[0].end_of_text
    samples = [[("a", False), (end, True, False, markup)] for markup in (True, False)][::order]
    plan = TaskEncoding(Given("mftcoder", {}, end))
    expected = [naive(both[0], [Segment(*segment) for segment in sample]) for sample in samples]
    for tokenizer in both:
        encoder = Encoder(tokenizer, {"task": plan})
        for sample, own in zip(samples * 2, expected * 2, strict=True):
            line = json.dumps({"text": json.dumps(sample)}).encode()
            assert samples_of(encoder.encode("task", RecordBatch("file", 1, [line]))) == [own]


def test_each_task_has_its_own_encoding(tokenizer):
    plans = {
        "chat": TaskEncoding(chat_format("mftcoder", tokenizer)),
        "marked": TaskEncoding(chat_format("mftcoder", tokenizer, '{"user": "Q: ", "assistant": "A: "}')),
        "raw": TaskEncoding(chat_format("mftcoder", tokenizer), record_format="prompt_completion"),
    }
    record = {"instruction": "a", "output": "b", "prompt": "c", "completion": "d"}
    encoder = Encoder(tokenizer, pickle.loads(pickle.dumps(plans)))
    batch = RecordBatch("file", 1, [json.dumps(record).encode()])
    end = tokenizer.end_of_text
    for task, expected in {"chat": f"b{end}", "marked": f"A: b{end}", "raw": f"cd{end}"}.items():
        assert tokenizer.decode(encoder.encode(task, batch).ids).strip().endswith(expected)


def test_rows_are_records_as_lines_are(tokenizer):
    records = TASKS["complete"](functions()[:20])
    lines, rows = encode(tokenizer, map(json.dumps, records)), encode(tokenizer, records)
    assert samples_of(lines) == samples_of(rows)
    bad = encode(tokenizer, [*records[:2], {"body": 1}, {"text": "ab\ud800"}])
    assert [(drop.line, drop.reason) for drop in bad.drops] == [(3, "unknown_shape"), (4, "invalid_text")]
    assert bad.records == 4


def test_documents_are_counted(tokenizer):
    records = [{"text": "x = 1\n"}, {"prompt": "a", "completion": "b"}, {"text": ""}, {"text": "y"}]
    assert encode(tokenizer, map(json.dumps, records)).documents == 2


def test_a_sample_begins_with_bos_once(llama_like_folder):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", llama_like_folder)
    records = [{"prompt": "def f", "completion": "(x)"}, {"prompt": "<s>a", "completion": "b"}, {"text": "c"}]
    plain, begun = (encode(tokenizer, map(json.dumps, records), add_bos=bos) for bos in (False, True))
    bos = tokenizer.bos_token_id
    for (ids, mask), (own, own_mask) in zip(samples_of(plain), samples_of(begun), strict=True):
        already = ids[0] == bos
        assert (own, own_mask) == ((ids, mask) if already else ([bos, *ids], [0, *mask]))
    assert [ids[0] == bos for ids, _ in samples_of(plain)] == [False, True, False]


def test_bos_without_such_a_token_is_refused(tokenizer_folder):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    if tokenizer.bos_token_id is not None:
        pytest.fail("the fixture has a bos token now; take another")
    plan = TaskEncoding(chat_format("chatml", tokenizer), add_bos=True)
    for count in (1, 2):
        with pytest.raises(InputError, match=r"^--add-bos: the tokenizer names no BOS token; leave"):
            Workers(count, tokenizer, {"code": plan}, cache=None).__enter__()


class HalfFim:
    """Reverses prompts that begin with "fim", and records the keys that it is given."""

    def __init__(self):
        self.keys = []

    def segments(self, conversation, key):
        self.keys.append(key)
        if not conversation.turns[0].content.startswith("fim"):
            return None
        learned = conversation.turns[-1].content != "drop"
        return [Segment("turned", False), Segment(conversation.turns[0].content, learned)]


def test_fill_in_the_middle_replaces_some_records(tokenizer):
    fim = HalfFim()
    records = [
        {"prompt": "fim", "completion": "b"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b"},
    ]
    encoded = encode(tokenizer, map(json.dumps, records), fim=fim)
    assert [tokenizer.decode(ids) for ids, _ in samples_of(encoded)] == [
        "turnedfim",
        *[f"{space_before_texts(tokenizer)}ab{tokenizer.end_of_text}"] * 2,
    ]
    assert fim.keys[0] != fim.keys[1] == fim.keys[2]
    assert encoded.filled == 1
    assert encode(tokenizer, map(json.dumps, records)).filled == 0
    # what has no target in the end is not counted, nor a chat
    records = [{"prompt": "fim", "completion": "b"}, {"prompt": "fim", "completion": "drop"}, {"text": "fim"}]
    assert encode(tokenizer, map(json.dumps, records), fim=fim).filled == 2


BAD_LINES = {
    b'{"text": "abc"': "invalid_json",
    b"[" * 100_000: "invalid_json",
    b'{"text": "\xff"}': "invalid_utf8",
    b"\xef\xbb\xbf{}": "invalid_json",
    b'"just a string"': "unknown_shape",
    b'{"text": "\\ud800"}': "invalid_text",
    b'{"text": ""}': "empty_answer",
    b'{"prompt": "a", "completion": ""}': "empty_answer",
    b'{"question": "a", "answer": ""}': "empty_answer",
    b'[{"text": "a"}]': "unknown_shape",
    b'{"text": "a"}\r{"text": "b"}': "invalid_json",
    b'{"text": "a", "n": ' + b"1" * 5000 + b"}": "invalid_json",
    b'{"text": NaN}': "wrong_type",
}


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "t", "k": "a", "k": "b"}',
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "k": 1, "k": 1}]}',
        b'{"text": "t", "meta": {"x": [{"\\u006b": 1, "k": null}]}}',
    ],
)
def test_a_repeated_key_refuses_the_first_records_of_a_batch(tokenizer, line):
    good = b'{"text": "k", "meta": [{"k": "k"}, {"k": "\\"k\\": 1, \\"k\\": 2"}]}'
    encoded = encode(tokenizer, [good, b" ", line, *[good] * 14, line])
    message = "the key 'k' is in an object twice; keep one of the two"
    assert [(drop.line, drop.reason, drop.message) for drop in encoded.drops] == [(3, "repeated_key", message)]


def test_every_line_is_accounted_for(tokenizer):
    good = b'{"prompt": "a", "completion": "b"}\r\n'
    encoded = encode(tokenizer, [b"", good, b" \t\r\n", *BAD_LINES, good])
    assert {drop.line: drop.reason for drop in encoded.drops} == dict(enumerate(BAD_LINES.values(), 4))
    assert [drop.line for drop in encoded.drops] == sorted(drop.line for drop in encoded.drops)
    assert encoded.records == len(encoded.lengths) + len(encoded.drops) == len(BAD_LINES) + 2
    assert all("\n" not in drop.message for drop in encoded.drops)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[\n", r"not JSON \(Expecting value, at character 3\); write one record a line, or name the file .json"),
        (
            b"  {\n",
            r"not JSON \(Expecting property name .*\); a record is one line, or one item of an array in a .json file",
        ),
        (b'[{"text": "a"}]\n', "a record is a JSON object, not list; write one record a line, or name the file .json"),
        (
            b'{"text": "a"}\r{"text": "b"}\r',
            r"not JSON \(Extra data, at character 15\); lines end in carriage returns alone here, write line feeds",
        ),
        (b'"a", "b"', r"not JSON \(Extra data, at character 4\); a record is a JSON object"),
        (b"text\n", r"not JSON \(Expecting value, at character 1\); a record is a JSON object"),
        (
            gzip.compress(b'{"text": "a"}', mtime=0),
            r"not UTF-8 \(byte 1 of the line\); the file is compressed, .* ending \.gz",
        ),
        (b"\x28\xb5\x2f\xfd\x04", r"not UTF-8 \(byte 1 of the line\); the file is compressed, .* ending \.zst"),
        ('{"text": "a"}'.encode("utf-16"), r"not UTF-8 \(byte 0 of the line\); the file is UTF-16, save it as UTF-8"),
        (b'{"n": ' + b"1" * 5000 + b"}\r\n", r"not JSON that can be read \(a whole number of more than 4300 digits\)"),
        (b"[" * 100_000 + b"\r\n", r"not JSON that can be read \(nested too deeply\); write one record a line.*"),
    ],
)
def test_the_likely_cause_of_a_line_that_is_no_record_is_reported(tokenizer, line, message):
    (drop,) = encode(tokenizer, [line]).drops
    assert re.fullmatch(message, drop.message)


def test_names_of_tokens_count_in_a_raw_prompt_alone(tokenizer):
    name = tokenizer.end_of_text
    number = tokenizer.token_id(name)
    records = [{"prompt": f"a{name}", "completion": "b"}, {"prompt": "a", "completion": f"b{name}c"}]
    records += [{"text": f"a{name}b"}, {"question": f"a{name}", "answer": f"b{name}c"}]
    for fim in (None, Fim(1.0, 0.5, FimFamily(("<p>", "<s>", "<m>"), name), 1)):
        samples = samples_of(encode(tokenizer, map(json.dumps, records), fim=fim))
        assert [ids.count(number) for ids, _ in samples] == [2, 1, 1, 1]


def test_empty_batches(tokenizer):
    for lines in ([], [b"\n"], [b"{"]):
        encoded = encode(tokenizer, lines)
        assert samples_of(encoded) == []
        assert encoded.documents == 0


def test_a_chat_needs_a_token_that_ends_a_turn(llama_like_folder):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", llama_like_folder)
    plan = TaskEncoding(chat_format("chatml", tokenizer))
    assert len(encode(tokenizer, ['{"text": "a"}'], plan).lengths) == 1
    with pytest.raises(InputError, match=r"^file:2: a chat record, but the tokenizer has no token <\|im_end\|>"):
        encode(tokenizer, ['{"text": "a"}', '{"instruction": "a", "output": "b"}'], plan)


def test_conversations_that_a_format_cannot_write_are_dropped(tokenizer):
    class Picky(BuiltInFormat):
        def segments(self, conversation, notes=None):
            raise RecordError("too_long_a_name", "no place for it")

    encoded = encode(tokenizer, ['{"text": "a"}'], TaskEncoding(Picky("mftcoder", {}, "")))
    assert [(drop.path, drop.line, drop.reason, drop.message) for drop in encoded.drops] == [
        ("file", 1, "too_long_a_name", "no place for it")
    ]


@pytest.mark.parametrize("bad", [0, 1, 7, 30])
def test_a_wrong_fast_backend_is_reported_with_the_line(tokenizer_folder, bad):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder, "gigatoken")
    right = tokenizer._checked._fast.encode

    def wrong(text):
        return right(text)[::-1] if text.startswith("spoilt") else right(text)

    tokenizer._checked._fast = FastBackend("gigatoken", wrong)
    lines = [json.dumps({"prompt": f"{name} <|im_end|>", "completion": f"{name} text"}) for name in map(str, range(31))]
    lines[bad] = json.dumps({"prompt": "p <|im_end|>", "completion": "spoilt text"})
    lines[4:4] = ["", "{"]  # a blank line and a bad one shift the places
    line = bad + 1 + 2 * (bad >= 4)
    with pytest.raises(
        BackendMismatch, match=rf"^file:{line}: 'spoilt text' is tokenised differently by gigatoken and hf$"
    ):
        encode(tokenizer, lines)


def test_wrong_texts_after_the_first_are_found_among_the_sampled_ones(tokenizer_folder):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder, "gigatoken")
    right = tokenizer._checked._fast.encode
    encoder = Encoder(tokenizer, {"task": TaskEncoding(chat_format("chatml", tokenizer))})
    lines = [json.dumps({"text": f"some text with number {number} in it"}).encode() for number in range(2000)]
    encoder.encode("task", RecordBatch("file", 1, lines[:100]))
    tokenizer._checked._fast = FastBackend("gigatoken", lambda text: right(text)[:-1])
    drawn = next(n for n, line in enumerate(lines) if n >= 100 and backends._is_sampled(json.loads(line)["text"]))
    with pytest.raises(BackendMismatch, match=f"^file:{drawn + 1}: "):
        encoder.encode("task", RecordBatch("file", 101, lines[100:]))


SYSTEM_TURNS = {
    "a second system turn": ["s", "s", "u", "a"],
    "a second system turn later": ["s", "u", "a", "s", "u", "a"],
    "a system turn after others": ["u", "a", "s", "u", "a"],
}


@pytest.mark.parametrize("turns", SYSTEM_TURNS)
@pytest.mark.parametrize(("template", "taken"), [(QWEN2, False), (QWEN3, True), ("chatml", True), ("mftcoder", True)])
def test_system_turns_are_written_or_named_as_the_cause(tokenizer_folder, tmp_path, template, taken, turns):
    if len(template) > 10:
        (tmp_path / "own.jinja").write_text(template)
        template = str(tmp_path / "own.jinja")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": roles[turn], "content": f"text {n}"} for n, turn in enumerate(SYSTEM_TURNS[turns])]
    plan = TaskEncoding(chat_format(template, tokenizer))
    encoded = encode(tokenizer, [json.dumps({"messages": messages})], plan)
    if taken:
        assert not encoded.drops
        text = tokenizer.decode(encoded.ids.tolist())
        assert [n for n in range(len(messages)) if f"text {n}" in text] == list(range(len(messages)))
    else:
        (drop,) = encoded.drops
        at = SYSTEM_TURNS[turns].index("s", 1)
        assert drop.message.startswith(f"turn {at} is {turns.removesuffix(' later')}, which --chat-template own.jinja")
        assert drop.message.endswith(
            "put all system text into the first turn, or use a template that takes several, such as chatml"
        )


def test_another_cause_than_system_turns_is_not_blamed_on_them(tokenizer_folder, tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATES["gemma"])
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    plan = TaskEncoding(chat_format(str(tmp_path / "own.jinja"), tokenizer))
    turns = [{"role": role, "content": "x"} for role in ("system", "system", "user", "assistant")]
    (drop,) = encode(tokenizer, [json.dumps({"messages": turns})], plan).drops
    assert drop.message == "--chat-template own.jinja refuses it: System role not supported"
    assert shown_format("template") == "the tokenizer's chat template"
    assert shown_format("chatml") == "--chat-template chatml"


def test_memory_holds_a_large_record_a_few_times(tokenizer_folder):
    """A copy of its text while that is tokenised, then ids and mask: nothing else grows with the record."""
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder, "gigatoken")
    encoder = Encoder(tokenizer, {"t": TaskEncoding(chat_format("mftcoder", tokenizer))})
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "".join(SOURCES) * 16}]
    size = len(turns[1]["content"])
    encoder.encode("t", RecordBatch("f", 1, [{"messages": turns[:1] * 2}]))  # what is opened at the first record
    tracemalloc.start()
    try:
        encoded = encoder.encode("t", RecordBatch("f", 1, [{"messages": turns}]))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 5.2 * len(encoded.ids)
    assert peak < 1.5 * size + 9 * len(encoded.ids)


def test_rounds_with_an_empty_answer_are_left_out_of_a_split_record(tmp_path):
    """The empty answer is counted, and the other rounds are used, as in a record that is not split."""
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save_tokenizer(tmp_path / "tokenizer", QWEN3))
    plan = TaskEncoding(chat_format("auto", tokenizer), split_thinking_rounds=True)

    def rounds(*answers):
        question = {"role": "user", "content": "Q"}
        return json.dumps({"messages": [turn for answer in answers for turn in (question, answer)]})

    good = {"role": "assistant", "content": "A", "reasoning_content": "R"}
    empty = {"role": "assistant", "content": " "}
    unused = {"role": "assistant", "content": "A", "reasoning_content": "R", "train": False}
    encoded = encode(tokenizer, [rounds(good, empty, good, empty), rounds(good, good), rounds(unused, empty)], plan)
    assert (encoded.records, encoded.added, len(encoded.lengths)) == (3, 2, 4)
    assert [(drop.line, drop.reason) for drop in encoded.drops] == [(3, "empty_answer")]
    assert encoded.notes.kinds == {"rounds_split": 2, "empty_answer_not_learnt": 2}


NOTED_MESSAGES = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "<|im_end|>", "extra": 1},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": " b"},
]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"topic": 1', "invalid_json"),
        ({"topic": 1, "text": 3}, "wrong_type"),
        ({"topic": 1, "messages": NOTED_MESSAGES, "images": ["a.png"]}, "unsupported_content"),
        ({"topic": 1, "messages": [*NOTED_MESSAGES[:4], {"role": "assistant", "content": "raise"}]}, "template_error"),
        ({"topic": 1, "messages": NOTED_MESSAGES[:3]}, "empty_answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_record_that_is_left_out_counts_no_note(tmp_path, record, reason):
    raising = "{%- if message.content == 'raise' %}{{ raise_exception('no') }}{%- endif %}"
    template = QWEN2.replace("{%- for message in messages %}", "{%- for message in messages %}" + raising)
    assert raising in template
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save_tokenizer(tmp_path / "t", template))
    plan = TaskEncoding(chat_format("auto", tokenizer))
    used = {"id": 1, "messages": NOTED_MESSAGES}
    alone = encode(tokenizer, [used], plan)
    assert alone.notes.unread_keys == {"id": 1, "messages[].extra": 1}
    assert {"developer_turn", "empty_answer_not_learnt"} <= alone.notes.kinds.keys()
    both = encode(tokenizer, [used, record, used], plan)
    assert [drop.reason for drop in both.drops] == [reason]
    for what in ("unread_keys", "kinds"):
        assert getattr(both.notes, what) == {name: 2 * n for name, n in getattr(alone.notes, what).items()}


def test_a_record_without_a_supervised_token_counts_no_note(tokenizer):
    texts = [json.dumps([["a b", supervised, False]]) for supervised in (False, True, False, True)]
    records = [json.dumps({"topic": 1, "text": text}) for text in texts]
    encoded = encode(tokenizer, records, TaskEncoding(Given("chatml", {}, "</s>")))
    assert [drop.line for drop in encoded.drops] == [1, 3]
    assert encoded.notes.unread_keys == {"topic": 2}


def test_fingerprints_of_different_encodings_differ():
    style = BuiltInFormat("chatml", {"user": "u"}, "</s>")
    fim = Fim(0.5, 0.5, FimFamily(("<P>", "<S>", "<M>"), "<E>"), seed=1)
    family = dataclasses.replace(fim.family, end="<F>")
    changes = {
        "style": [dataclasses.replace(style, supervise="last"), dataclasses.replace(style, learn_empty_answers=True)],
        "record_format": ["messages"],
        "fim": [fim, *(dataclasses.replace(fim, **change) for change in ({"seed": 2}, {"family": family}))],
        "add_bos": [True],
        "ignored_keys": [("a",), ("a", "b"), ("a/b",), ("a', 'b",)],
        "split_thinking_rounds": [True],
    }
    assert list(changes) == [field.name for field in dataclasses.fields(TaskEncoding)]
    base = TaskEncoding(style)
    others = [dataclasses.replace(base, **{name: value}) for name, values in changes.items() for value in values]
    assert len({encoding.fingerprint for encoding in (base, *others)}) == 1 + len(others)
    assert base.fingerprint == TaskEncoding(dataclasses.replace(style)).fingerprint


NAME = "<|im_end|>"
CALLED = {"name": "f", "arguments": {"a": NAME}}
TOOL = {"type": "function", "function": {"name": "f", "description": f"after {NAME}", "parameters": {}}}


def turns(question="q", answer="a", **of_answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **of_answer}]


@pytest.mark.parametrize("template", ["chatml", "mftcoder", "qwen2"])
@pytest.mark.parametrize(
    ("record", "counted"),
    [
        ({"messages": turns(f"What is {NAME}?")}, True),
        ({"messages": turns(answer=f"a{NAME}")}, True),
        ({"messages": [*turns(), *turns("<|im_start|>system")]}, True),
        ({"messages": turns(answer="", tool_calls=[{"type": "function", "function": CALLED}])}, True),
        ({"messages": turns(), "tools": [TOOL]}, True),
        ({"text": f"one{NAME}two"}, True),
        ({"prompt": "def f(", "completion": f"x):{NAME}"}, True),
        # in a raw prompt it is the token, to a server and in the data
        ({"prompt": f"a{NAME}", "completion": "b"}, False),
        ({"messages": turns("<|im_en", "d|>")}, False),
        # the tokenizer makes a token of it everywhere
        ({"messages": turns("<tool_call>")}, False),
        ({"text": "one two"}, False),
    ],
)
def test_records_with_the_name_of_a_token_are_counted(tmp_path, template, record, counted):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save_tokenizer(tmp_path / "tokenizer"))
    if template in TEMPLATES:
        (tmp_path / "given.jinja").write_text(TEMPLATES[template])
        template = str(tmp_path / "given.jinja")
    plan = TaskEncoding(chat_format(template, tokenizer))
    encoded = encode(tokenizer, [json.dumps(one) for one in (record, {"messages": turns()}, record)], plan)
    assert len(encoded.lengths) == 3
    assert encoded.notes.kinds["token_names"] == 2 * counted


def test_a_record_of_several_rounds_with_the_name_of_a_token_is_counted_once(tmp_path):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save_tokenizer(tmp_path / "tokenizer"))
    (tmp_path / "given.jinja").write_text(QWEN3)
    plan = TaskEncoding(chat_format(str(tmp_path / "given.jinja"), tokenizer), split_thinking_rounds=True)
    rounds = [*turns(reasoning_content=f"of {NAME}"), *turns(reasoning_content="of r")]
    encoded = encode(tokenizer, [json.dumps({"messages": rounds})], plan)
    assert len(encoded.lengths) == 2
    assert encoded.notes.kinds == {"rounds_split": 1, "token_names": 1}

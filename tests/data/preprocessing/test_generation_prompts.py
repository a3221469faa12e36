"""The prompt that a server renders is compared with what stands before trained answers."""

import json
import shutil

import pytest

from mft_megatron.data.chat_templates.formats import chat_format
from mft_megatron.data.chat_templates.jinja_messages import message_of
from mft_megatron.data.preprocessing import generation_prompts
from mft_megatron.data.preprocessing.encoding import TaskEncoding
from mft_megatron.data.preprocessing.generation_prompts import GenerationPrompts
from mft_megatron.data.records.record_formats import read_record
from mft_megatron.data.tasks.record_batches import RecordBatch
from mft_megatron.data.tokenizers.load import load_tokenizer
from tests.data.chat_templates.templates import PARTED, QWEN2, TEMPLATES, save_tokenizer


def chat(*contents, reasoning=None):
    """A record of questions and answers by turns."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    for turn in turns[1::2]:
        turn.update({} if reasoning is None else {"reasoning_content": reasoning})
    return {"messages": turns}


ONE, TWO = chat("2+2?", "4"), chat("2+2?", "4", "And 3+3?", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("prompts") / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer("HuggingFaceTokenizer", folder)


@pytest.fixture
def note(tokenizer, tmp_path):
    """A function that watches records and returns the note."""

    def note(template, *records, opened=tokenizer, of_array=False, **options):
        if template in TEMPLATES or "{" in template:
            path = tmp_path / "given.jinja"
            path.write_text(TEMPLATES.get(template, template))
            template = str(path)
        encoding = TaskEncoding(chat_format(template, opened), **options)
        watched = GenerationPrompts("qa", opened, encoding)
        lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
        batches = [RecordBatch("file", 1, lines, of_array)]
        assert list(watched.watch(batches)) == batches
        return watched.note

    return note


EQUAL = ["qwen2", "llama3", "llama2", "mistral", "qwen3", "phi3", "gemma", "tagged", "chatml", "mftcoder"]


@pytest.mark.parametrize("template", EQUAL)
def test_most_templates_give_the_same_prompt(note, template):
    assert note(template, ONE, TWO, chat("  f(x)\n", "\n\n    return 1\n", "\n", " x", "y", "z")) is None
    assert note(template, TWO, add_bos=True) is None


ENDS = "task qa: a server's prompt ends in {}, trained answers begin after {}; {}"
THINKS = (
    "a model that thinks is given '<think>\\n' before each answer: give answers their reasoning, with a template that "
    "writes it and --split-thinking-rounds where a record has several rounds, or serve without thinking (file:{})"
)
UNWRITTEN = (
    "servers then ask the model to write '<|im_start|>assistant\\n', which is not trained; give a --chat-template that "
    "writes it if add_generation_prompt is set (file:1)"
)


@pytest.mark.parametrize(
    ("template", "records", "expected"),
    [
        (
            "reasoner",
            [ONE],
            ENDS.format("'<|assistant|><think>\\n'", "'<|assistant|>'", THINKS.format(1)),
        ),
        # the template writes the tags in the last round, but not in the first
        ("thinking", [ONE], None),
        ("thinking", [chat("2+2?", "4", reasoning="two twos")], None),
        (
            "thinking",
            [ONE, TWO],
            ENDS.format("'<|im_start|>assistant\\n<think>\\n'", "'<|im_start|>assistant\\n'", THINKS.format(2)),
        ),
        ("unprompted", [ONE], ENDS.format("'<|im_end|>\\n'", "'<|im_end|>\\n<|im_start|>assistant\\n'", UNWRITTEN)),
        (
            QWEN2[: -len("{%- endif %}\n")].replace("assistant\\n' }}\n", "assistant\\nSure, ' }}\n")
            + "{%- endif %}\n",
            [ONE],
            ENDS.format(
                "'<|im_start|>assistant\\nSure, '",
                "'<|im_start|>assistant\\n'",
                "let trained answers begin with what follows it, or give a --chat-template without it (file:1)",
            ),
        ),
    ],
)
def test_notes(note, template, records, expected):
    assert note(template, *records) == expected


def test_a_difference_within_the_prompt_is_shown_in_both(note):
    loud = QWEN2.replace("+ message.content +", "+ message.content + ('!' if add_generation_prompt else '') +")
    served, trained = note(loud, ONE).split(", trained prompts have ")
    assert served.startswith("task qa: a server's prompt has ")
    assert "2+2?!<|im_end|>" in served
    assert "2+2?<|im_end|>" in trained


def test_rounds_that_are_split_have_the_prompt_of_a_server(note):
    record = chat("2+2?", "4", "3+3?", "6", reasoning="why")
    assert "<think>" in note("thinking", record)
    assert note("thinking", record, split_thinking_rounds=True) is None
    # a template that writes all reasoning, which no server gets back
    keeps = QWEN2.replace("+ message.content +", "+ (message.reasoning_content or '') + message.content +")
    assert "why" in note(keeps, record)
    assert note(keeps, record, split_thinking_rounds=True) is None


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLS = {
    "messages": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
}
REASONER = TEMPLATES["reasoner"].replace("<think>\n", "")


def test_a_content_of_null_is_removed_as_by_newer_transformers(note):
    told = note(REASONER, CALLS)
    assert told.startswith("task qa: a server cannot write the prompt of turn 3: --chat-template ")
    assert "has no attribute 'content', as newer versions of transformers (5.23) remove the content of a turn" in told
    assert told.endswith("let the template test 'not message.content' instead of 'is none' (file:1)")
    assert note(REASONER, ONE) is None
    assert note(REASONER.replace("message['content'] is none", "not message['content']"), CALLS) is None
    # what is refused for another reason has no such words
    refuses = "{% if add_generation_prompt and messages[-1].role == 'tool' %}{{ raise_exception('No.') }}{% endif %}"
    told = note(refuses + REASONER, CALLS)
    assert told.startswith("task qa: a server cannot write the prompt of turn 3: ")
    assert told.endswith("refuses it: No. (file:1)")


def test_the_prompt_of_calls_is_that_of_transformers(folder, tokenizer, tmp_path):
    """A content of null beside calls becomes what the installed version of transformers makes of it."""
    transformers = pytest.importorskip("transformers")
    source = "{% for m in messages %}{{ m.content is none }}|{{ m.content is defined }};{% endfor %}"
    path = tmp_path / "given.jinja"
    calls = "(message['content'] is none or message['content'] is not defined)"
    path.write_text(REASONER.replace("message['content'] is none", calls) + source)
    conversation = read_record(CALLS, "auto")
    ours = chat_format(str(path), tokenizer).prompt(conversation, 3)
    messages = [message_of(turn, True) | ({"content": None} if turn.tool_calls else {}) for turn in conversation.turns]
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages[:3], chat_template=path.read_text(), tokenize=False, add_generation_prompt=True
    )
    assert "False|False" in ours
    assert ours in (theirs, theirs.replace("True|True", "False|False"))  # older versions keep the key


def test_only_the_first_part_of_a_turn_is_behind_a_prompt(note):
    prompted = PARTED + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    assert note(prompted, chat("2+2?", "4", "3+3?", "6", reasoning="why")) is None


def test_what_is_not_a_chat_is_passed_over(note):
    raw = [{"text": "a"}, {"prompt": "a", "completion": "b"}, b"{", b"", {"unheard": "of"}, {"messages": []}]
    assert note("reasoner", *raw) is None
    assert note("reasoner", *raw, ONE).endswith("(file:7)")
    assert note("reasoner", *raw, ONE, of_array=True).endswith("(file: record 7)")
    # the name of a token in a turn is text in a sample and that token in a server's prompt
    assert note("qwen2", chat("<|im_end|>", "<|im_start|>")) is None


def test_large_records_are_passed_over(note, tokenizer):
    large = chat("2+2?", "4" * generation_prompts.LONGEST)
    assert note("reasoner", large) is None
    assert note("reasoner", large, ONE).endswith("(file:2)")
    encoding = TaskEncoding(chat_format("chatml", tokenizer))
    watched = GenerationPrompts("qa", tokenizer, encoding)
    watched._look_at(large, "row")  # of a parquet file
    assert not +watched._chats


def test_only_the_first_chats_of_each_shape_are_looked_at(note, monkeypatch):
    monkeypatch.setattr(generation_prompts, "CHATS", 3)
    monkeypatch.setattr(generation_prompts, "LINES", 5)
    added = "('!' if add_generation_prompt and '3' in {} else '')"  # of which a server's prompt has more
    loud = QWEN2.replace("+ message.content +", f"+ message.content + {added.format('message.content')} +")
    three, raw = chat("3+3?", "6"), {"text": "a"}
    assert note(loud, ONE, ONE, three) is not None
    assert note(loud, ONE, ONE, ONE, three) is None
    for other in (TWO, chat("3", "4", reasoning=""), {**three, "tools": [{"name": "f"}]}):
        assert note(loud, ONE, ONE, ONE, other) is not None
    first = "messages[0]['content']"
    loud = QWEN2.replace(f"{first} + '<", f"{first} + {added.format(first)} + '<")
    system = {"messages": [{"role": "system", "content": "3"}, *ONE["messages"]]}
    assert note(loud, ONE, ONE, ONE, system) is not None
    assert note(loud, raw, raw, raw, raw, system) is not None
    assert note(loud, raw, raw, raw, raw, raw, system) is None


def test_tools_are_in_both_prompts(note):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    turns = [
        {"role": "user", "content": "Q"},
        call,
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "7"},
    ]
    record = {"messages": turns, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}
    for template in ("qwen2", "chatml", "mftcoder"):
        assert note(template, record) is None


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize("markers", [None, '{"user": "USER: ", "assistant": "</s>BOT: "}'])
def test_spaces_that_a_tokenizer_writes_into_prompts_are_in_samples_too(
    llama_like_folder, tmp_path, markers, tokenizer_class, add_bos
):
    """These tokenizers write a space before a text, and one of them after every special token."""
    config = json.loads((llama_like_folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": tokenizer_class}))
    shutil.copy(llama_like_folder / "tokenizer.json", tmp_path)
    opened = load_tokenizer("HuggingFaceTokenizer", tmp_path)
    encoding = TaskEncoding(chat_format("mftcoder", opened, markers), add_bos=add_bos)
    watched = GenerationPrompts("qa", opened, encoding)
    list(watched.watch([RecordBatch("file", 1, [json.dumps(record).encode() for record in (ONE, TWO)])]))
    assert watched.note is None

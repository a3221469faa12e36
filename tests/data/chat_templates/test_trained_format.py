"""The chat format that the ledger records: the Jinja text of each task, the one of most chats, and what is served."""

import dataclasses
import json
from pathlib import Path

import pytest

from mft_megatron.data.chat_templates.builtin_formats import FORMATS
from mft_megatron.data.chat_templates.formats import chat_format
from mft_megatron.data.chat_templates.jinja_renderer import renderer
from mft_megatron.data.chat_templates.trained_format import served_source, trained_format
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.preprocessing.preprocess import preprocess
from mft_megatron.data.preprocessing.recipe import Recipe
from mft_megatron.data.preprocessing.repack import merge
from mft_megatron.data.storage.ledger import ledger_path, read_ledger
from mft_megatron.data.tasks.task_files import TaskFiles
from mft_megatron.data.tokenizers.load import load_tokenizer
from tests.data.chat_templates.templates import GEMMA, PHI3, QWEN2, UNPROMPTED, save_tokenizer
from tests.data.conftest import write_task

CHAT = [{"instruction": f"Q{n}", "output": "A"} for n in range(40)]
RAW = [{"prompt": f"def f{n}(", "completion": "x):\n"} for n in range(40)]
DOCUMENTS = [{"text": f"x = {n}\n"} for n in range(40)]
OPTIONS = PackingOptions(256, split=(1, 0, 0))


def test_the_text_of_the_format_is_recorded_by_task(make_dataset):
    _, ledger = make_dataset({"a": CHAT, "b": RAW, "c": DOCUMENTS}, chat_template="mftcoder")
    (source,) = ledger.chat_template["sources"]
    assert (source["name"], source["tasks"]) == ("mftcoder", ["a"])
    assert "<s>human\\n" in source["source"]
    assert [task.chats for task in ledger.tasks] == [40, 0, 0]
    assert trained_format(ledger).difference == ""
    assert trained_format(ledger).source == source["source"]


def test_data_without_a_chat_have_no_format(make_dataset):
    _, ledger = make_dataset({"b": RAW}, chat_template="chatml")
    assert trained_format(ledger).source is None
    assert ledger.chat_template["stop_token_ids"] == [ledger.tokenizer.eos_token_id]


def test_data_that_were_made_before_are_not_known(make_dataset, tmp_path):
    prefix, ledger = make_dataset({"a": CHAT}, chat_template="mftcoder")
    content = json.loads(ledger.to_json())
    del content["chat_template"]["sources"]
    for field in ("chats", "examples", "noted", "unread_keys"):
        del content["tasks"][0][field]
    ledger_path(prefix).write_text(json.dumps({**content, "format_version": 2}))
    assert trained_format(read_ledger(prefix)) is None
    other, _ = make_dataset({"b": CHAT}, chat_template="mftcoder")
    merged, _ = merge([other, prefix], tmp_path / "all", OPTIONS)
    assert trained_format(merged) is None
    assert [(task.name, task.chats) for task in merged.tasks] == [("b", 40), ("a", None)]


def test_tokens_that_are_given_may_be_chats(make_dataset):
    """Their format is not known; the stop token of the chosen one counts, as before."""
    prefix, _ = make_dataset({"a": CHAT}, chat_template="chatml")
    tasks = {"a": TaskFiles("a", (Path(f"{prefix}_input_ids.idx"),))}
    _, ledger = make_dataset({"a": CHAT}, tasks=tasks, chat_template="chatml")
    assert ledger.tasks[0].chats == 0
    assert trained_format(ledger) is None
    assert len(ledger.chat_template["stop_token_ids"]) == 2


def test_the_format_of_most_chats_is_chosen(make_dataset, tmp_path):
    """Merged data sets are as one that was made at once; no data set has the most chats of the chosen format alone."""
    chatml, mftcoder = {"a": CHAT[:30]}, {"b": CHAT[:20], "c": CHAT[:15], "d": RAW}
    first, _ = make_dataset(chatml, chat_template="chatml")
    second, _ = make_dataset(mftcoder, chat_template="mftcoder")
    ledger, notices = merge([first, second], tmp_path / "all", OPTIONS)
    trained = trained_format(ledger)
    assert notices == [trained.difference]
    assert (trained.name, trained.others) == ("mftcoder", {"chatml": ["a"]})
    assert trained.source == read_ledger(second).chat_template["sources"][0]["source"]
    assert "most chats with mftcoder, a with chatml; " in trained.difference
    assert trained_format(read_ledger(first)).name == "chatml"


def test_chats_of_one_format_in_several_data_sets_count_together(make_dataset, tmp_path):
    names = {"a": "chatml", "b": "mftcoder", "c": "chatml"}
    prefixes = [
        make_dataset({task: CHAT[: 30 if name == "mftcoder" else 20]}, chat_template=name)[0]
        for task, name in names.items()
    ]
    ledger, _ = merge(prefixes, tmp_path / "all", OPTIONS)
    sources = ledger.chat_template["sources"]
    assert [(source["name"], source["tasks"]) for source in sources] == [("chatml", ["a", "c"]), ("mftcoder", ["b"])]
    assert (trained_format(ledger).name, trained_format(ledger).others) == ("chatml", {"mftcoder": ["b"]})


def test_tasks_of_different_formats_are_named(tmp_path, tokenizer_folder):
    files = {name: (write_task(tmp_path, name, records),) for name, records in {"a": CHAT, "b": CHAT[:20]}.items()}
    tasks = {"a": TaskFiles("a", files["a"]), "b": TaskFiles("b", files["b"], template="mftcoder")}
    model = str(tokenizer_folder)
    ledger, notices = preprocess(
        Recipe(tasks, "HuggingFaceTokenizer", model, tmp_path / "set", OPTIONS, chat_template="chatml")
    )
    assert trained_format(ledger).others == {"mftcoder": ["b"]}
    assert [line for line in notices if "different chat formats" in line] == [trained_format(ledger).difference]
    assert len(ledger.chat_template["stop_token_ids"]) == 2


# begins with the token if the first turn is the system's
BY_ROLE = """\
  {% for turn in messages %}
  {% if turn.role == "system" %}
{{- bos_token -}}
  {% endif %}
{{- turn.role + ":" + turn.content -}}
  {% endfor %}
"""


@pytest.mark.parametrize(
    ("name", "bos", "written"),
    [
        ("chatml", "<s>", "<s><|im_start|>user\nQ"),
        ("mftcoder", "<s>", "<s>human\nQ"),  # it begins with the token already
        ("mftcoder", "<bos>", "<bos><s>human\nQ"),
        (BY_ROLE, "<s>", "<s>user:Q"),
        (GEMMA, "<bos>", "<bos><start_of_turn>user\nQ"),
        (PHI3, "<bos>", "<bos><|user|>\nQ"),
        (f"  {UNPROMPTED}", "<s>", "<s><|im_start|>user\nQ"),
        (f"x  {UNPROMPTED}", "<s>", "<s>x  <|im_start|>user\nQ"),
        (
            QWEN2.replace("{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}", "{{ raise_exception('!') }}"),
            "<s>",
            "!",
        ),
    ],
)
def test_a_token_that_data_begin_with_is_in_the_template(tmp_path, name, bos, written):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save_tokenizer(tmp_path, bos=bos))
    template = name
    if name not in FORMATS:
        (tmp_path / "own.jinja").write_text(name)
        name = str(tmp_path / "own.jinja")
    style = chat_format(name, tokenizer)
    messages = [{"role": "user", "content": "Q"}]
    variables = {"bos_token": bos, "eos_token": "</s>"}
    if written == "!":
        messages.insert(0, {"role": "system", "content": "S"})
        written = "<s><|im_start|>system\nS"
    served = renderer(served_source(style, tokenizer, add_bos=True))
    assert served.render(messages, None, variables).startswith(written)
    with_system = [{"role": "system", "content": "S"}, *messages[-1:]]
    if template != GEMMA:  # which has no such turn
        whole = renderer(style.source).render(with_system, None, variables)
        assert served.render(with_system, None, variables) == (whole if whole.startswith(bos) else bos + whole)
    assert served_source(style, tokenizer, add_bos=False) == style.source


def test_a_tokenizer_without_the_token_changes_nothing(tmp_path):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save_tokenizer(tmp_path, bos=None))
    style = chat_format("chatml", tokenizer)
    assert served_source(style, tokenizer, add_bos=True) == style.source
    assert dataclasses.replace(style, markers={**style.markers, "tool": "user"}).source != style.source

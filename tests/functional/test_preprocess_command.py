"""tools/preprocess_data.py and tools/inspect_data.py as a user runs them: one whole pass, and every bad input."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.errors import run_command
from tests.ranks import ROOT, run_tool
from tests.refusals import refusal

GOOD = '{"prompt": "def f(", "completion": "x): return x"}\n'
RECORDS = {
    "messages": '{"messages": [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]}\n',
    "rounds": '{"id": 1, "chat_rounds": [{"role": "human", "content": "Say b."}, {"role": "bot", "content": "b"}]}\n',
    "instruction": '{"instruction": "Say", "input": "c", "output": "c"}\n',
    "completion": GOOD,
    "text": '{"text": "d = 1"}\n',
}


@pytest.fixture
def preprocess(tmp_path, tokenizer_folder):
    """A function that runs the command on tasks (name to content), with options added or replaced."""

    def run(tasks, *options, **replaced):
        (tmp_path / "tasks").mkdir(exist_ok=True)
        words = []
        for name, content in tasks.items():
            path = tmp_path / "tasks" / f"{name}.jsonl"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            words += ["--task", f"{name}={path}"]
        values = {
            "--tokenizer-model": tokenizer_folder,
            "--seq-length": 64,
            "--output-prefix": tmp_path / "out" / "set",
            **{f"--{name.replace('_', '-')}": value for name, value in replaced.items()},
        }
        words += [word for name, value in values.items() if value is not None for word in (name, value)]
        return run_tool("tools/preprocess_data.py", *words, *options)

    return run


def test_every_record_format(preprocess, tmp_path):
    tasks = {name: line * 3 for name, line in RECORDS.items()}
    process = preprocess(tasks, "--workers", "2", "--split", "2,1,0", "--chat-template", "mftcoder")
    assert process.returncode == 0, process.stderr
    assert all(name in process.stdout for name in RECORDS)
    assert process.stderr == ""
    opened = PackedDataset.open(tmp_path / "out" / "set", 64, check="hashes")
    assert opened.tasks == tuple(RECORDS)
    assert opened.splits == ("train", "valid")
    assert all(cut.kept == 3 and cut.splits == {"train": 2, "valid": 1, "test": 0} for cut in opened.entry.tasks)


KEYS = [
    {"question": "q", "answer": "a", "topic": "x", "source": "y", "images": ["1.jpg"]},
    {"messages": [{"role": "user", "content": "q", "at": 1}, {"role": "assistant", "content": "a"}] * 2, "topic": "z"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}] * 2, "topic": "z"},
]
KEYS[2]["messages"][3] = {"role": "assistant", "content": "a"}


def test_keys_that_are_not_read_are_counted_and_named_once(preprocess, tmp_path):
    lines = "".join(json.dumps(record) + "\n" for record in KEYS)
    options = ("--ignore-keys", "source,images,typo", "--chat-template", "chatml")
    process = preprocess({"t": lines}, *options, workers=2)
    assert process.returncode == 0, process.stderr
    notes = [line for line in process.stdout.splitlines() if line.startswith("note: ")]
    inspected = run_tool("tools/inspect_data.py", tmp_path / "out" / "set", "--samples", "0").stdout.splitlines()
    assert [line for line in inspected if line.startswith("note: ")] == notes[1:-1]
    assert notes[1:] == [
        "note: task t: 1 record has a key 'messages[].at' that is not read",
        "note: task t: 3 records have a key 'topic' that is not read",
        "note: task t: empty answers, which would teach to stop at once, are not learnt: 1; --learn-empty-answers "
        "learns them",
        "note: --ignore-keys typo: no record that is used has this key",
    ]
    (task,) = PackedDataset.open(tmp_path / "out" / "set", 64).ledger.tasks
    assert task.unread_keys == {"images": 1, "messages[].at": 1, "source": 1, "topic": 3}
    assert task.noted == {"empty_answer_not_learnt": 1}
    assert task.kept == 3


def test_another_working_folder_gives_the_same_data_set(preprocess, tmp_path, tokenizer_folder):
    tasks = tmp_path / "tasks"
    assert preprocess(RECORDS).returncode == 0
    words = ["--tokenizer-model", tokenizer_folder, "--seq-length", "64", "--output-prefix", "again"]
    names = [word for name in RECORDS for word in ("--task", f"{name}={tasks / name}.jsonl")]
    command = [sys.executable, ROOT / "tools/preprocess_data.py", *names, *words]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    hashes = [PackedDataset.open(tmp_path / name, 64).dataset_hash for name in ("again", "out/set")]
    assert hashes[0] == hashes[1]


# modules that take long to import, which a small job of one process must not wait for
SLOW_MODULES = {
    *("torch", "transformers", "datasets", "jinja2", "yaml", "pyarrow", "zstandard", "sentencepiece"),
    *("concurrent.futures", "multiprocessing.connection", "numpy.ma"),
    *("mft_megatron.data.loading", "mft_megatron.data.inspect"),
}
PRINT_MODULES = "import sys; print('modules', *sys.modules, file=sys.stderr)"


def imported_by(code):
    process = run_tool("-c", f"{code}\n{PRINT_MODULES}")
    assert process.returncode == 0, process.stderr
    return set(process.stderr.splitlines()[-1].split())


def test_help_imports_no_library():
    code = """
from mft_megatron.data import command
for main in (command.preprocess_main, command.pack_main, command.inspect_main):
    try:
        main(["--help"])
    except SystemExit as end:
        assert end.code == 0
"""
    modules = imported_by(code)
    assert "mft_megatron.data.command_options" in modules
    assert sorted(modules & (SLOW_MODULES | {"numpy", "tokenizers", "gigatoken", "orjson"})) == []


def test_a_small_job_imports_what_it_uses(tmp_path, tokenizer_folder):
    chat = {"messages": [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]}
    for name, record in {"chat": chat, "raw": {"prompt": "def f(", "completion": "x): return x"}}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    tasks = [word for name in ("chat", "raw") for word in ("--task", f"{name}={tmp_path / name}.jsonl")]
    words = ["--tokenizer-model", str(tokenizer_folder), "--seq-length", "64", "--output-prefix", f"{tmp_path}/set"]
    modules = imported_by(f"from mft_megatron.data.command import preprocess_main\npreprocess_main({tasks + words})")
    assert {"numpy", "tokenizers", "mft_megatron.data.preprocessing.preprocess"} <= modules
    assert sorted(modules & SLOW_MODULES) == []


BAD_TASKS = {
    "a broken line": (GOOD + '{"text": "a\n', "t.jsonl:2: not JSON"),
    "a broken line after blank ones": ("\n\n" + GOOD + "\n{]\n", "t.jsonl:5: not JSON"),
    "bytes that are no UTF-8": (b'{"text": "\xff"}', "t.jsonl:1: not UTF-8"),
    "half a surrogate pair": (r'{"text": "\ud800"}', "t.jsonl:1: text holds half"),
    "endless nesting": ("[" * 100_000, "t.jsonl:1: not JSON"),
    "no object": ("[1]\n", "t.jsonl:1: a record is a JSON object"),
    "an unknown shape": ('{"question": "q", "reply": "r"}\n', "keys ['question', 'reply']; known: messages"),
    "a wrong type": ('{"text": 3}\n', "t.jsonl:1: text must be a string, not int"),
    "an unknown role": ('{"messages": [{"role": "critic", "content": "x"}]}\n', "unknown role 'critic'; known: system"),
    "no assistant turn": ('{"messages": [{"role": "user", "content": "x"}]}\n', "no assistant turn"),
    "no supervised token": (GOOD + '{"text": ""}\n', "t.jsonl:2: every supervised answer is empty"),
    "an empty file": ("", "task t "),
    "blank lines only": ("\n \n\t\n", "no record at all"),
    "nothing kept": (GOOD.replace("def", "d" * 5000), "overlong 1"),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(preprocess, tmp_path, case):
    content, message = BAD_TASKS[case]
    process = preprocess({"good": GOOD, "t": content})
    assert message in refusal(process)
    assert process.returncode == 2
    assert {path.name for path in tmp_path.iterdir()} == {"tasks"}


def test_parts_are_merged_into_the_data_set_of_one_process(preprocess, tmp_path):
    whole, parts = tmp_path / "whole/set", tmp_path / "out/set"
    assert preprocess(RECORDS, output_prefix=whole).returncode == 0
    for number in (1, 2):
        process = preprocess(RECORDS, "--part", f"{number}/2")
        assert process.returncode == 0, process.stderr
        assert f"merge them: pack_data.py --data-path {parts}" in process.stdout
    assert "give I/N" in preprocess(RECORDS, "--part", "0/2").stderr
    process = run_tool("tools/pack_data.py", "--data-path", parts)
    assert process.returncode == 0, process.stderr
    assert "2 parts were merged" in process.stdout
    written = [{path.name: path.read_bytes() for path in prefix.parent.iterdir()} for prefix in (whole, parts)]
    assert written[0] == written[1]


def test_skipped_records_are_counted_by_reason(preprocess, tmp_path):
    bad = [line for line, _ in list(BAD_TASKS.values())[:11]]
    content = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in bad)
    process = preprocess({"t": content}, "--on-error", "skip")
    assert process.returncode == 0, process.stderr
    (task,) = PackedDataset.open(tmp_path / "out" / "set", 64).ledger.tasks
    assert task.kept == 3
    assert task.samples_in == 3 + sum(task.dropped.values())
    assert task.dropped == {
        "invalid_json": 3,
        "invalid_text": 1,
        "invalid_utf8": 1,
        "no_assistant_turn": 1,
        "empty_answer": 1,
        "unknown_role": 1,
        "unknown_shape": 2,
        "wrong_type": 1,
    }
    assert all(reason in process.stdout for reason in task.dropped)


BAD_OPTIONS = [
    (("--seq-lenght", "64"), {}, "unknown option --seq-lenght; did you mean --seq-length?"),
    (("--overlong", "keep"), {}, "--overlong"),
    (("--split", "98,2"), {}, "--split 98,2: give three weights"),
    (("--split", "0,0,0"), {}, "--split 0,0,0"),
    (("--split", "98,-2,4"), {}, "--split 98,-2,4"),
    (("--split", "nan,1,1"), {}, "--split nan,1,1"),
    (("--workers", "0"), {}, "--workers 0"),
    (("--seq-length", "1"), {}, "--seq-length 1"),
    (("--role-markers", "{"), {}, "--role-markers"),
    (("--ignore-keys", "a,,b"), {}, "--ignore-keys a,,b: give keys with commas between them"),
    (("--chat-template", "alpaca"), {}, "--chat-template"),
    (("stray",), {}, "unexpected argument 'stray'"),
    ((), {"seq_length": None}, "missing option: give --seq-length"),
    ((), {"tokenizer_model": None}, "missing option: give --tokenizer-model"),
    ((), {"output_prefix": None}, "missing option: give --output-prefix"),
    ((), {"tokenizer_model": "nowhere"}, "--tokenizer-model nowhere: no such file or folder"),
    ((), {"tokenizer_model": "nowhere", "tokenizer_type": "SentencePieceTokenizer"}, "nowhere: no such file"),
    (("--task", "u=nowhere.jsonl"), {}, "--task u=nowhere.jsonl: no such file"),
    (
        ("--task", "u=tools"),
        {},
        "--task u=tools: no .jsonl, .json (both also .gz or .zst), .parquet or .idx file there",
    ),
    (("--task", "nothing"), {}, "give NAME=PATH"),
]


@pytest.mark.parametrize(("options", "replaced", "message"), BAD_OPTIONS)
def test_bad_options_are_refused_in_one_line_and_write_nothing(preprocess, tmp_path, options, replaced, message):
    process = preprocess({"good": GOOD}, *options, **replaced)
    assert message in refusal(process)
    assert process.returncode == 2
    assert {path.name for path in tmp_path.iterdir()} == {"tasks"}


@pytest.mark.parametrize("tool", ["preprocess_data.py", "inspect_data.py"])
def test_help(tool):
    process = run_tool(f"tools/{tool}", "--help")
    assert process.returncode == 0
    assert "usage" in process.stdout


# --------------------------------------------------------------------------------------------------------- inspect


@pytest.fixture(scope="module")
def data_set(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("data_set")
    words = []
    for name, line in RECORDS.items():
        (folder / f"{name}.jsonl").write_text(line * 4)
        words += ["--task", f"{name}={folder / name}.jsonl"]
    options = ("--tokenizer-model", tokenizer_folder, "--seq-length", 64, "--output-prefix", folder / "set")
    assert run_tool("tools/preprocess_data.py", *words, *options).returncode == 0
    return folder / "set"


@pytest.fixture
def copied(data_set, tmp_path):
    for path in data_set.parent.glob("set_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / "set"


def test_inspect_shows_the_ledger_and_marked_samples(data_set):
    process = run_tool("tools/inspect_data.py", data_set, "--samples", 1, "--check")
    assert process.returncode == 0, process.stderr
    for shown in ("⟦a<|im_end|>⟧", "⟦b<|im_end|>⟧", "Say", "def f(⟦x): return x<|endoftext|>⟧", "⟦d = 1<|endoftext|>⟧"):
        assert shown in process.stdout
    assert "\033" not in process.stdout


@pytest.mark.parametrize("end", ["_input_ids.bin", "_loss_mask.bin", "_train_packs_64.npy", "_train_counts_64.npy"])
def test_check_finds_a_changed_byte(copied, end):
    path = Path(f"{copied}{end}")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert f"set{end}: its content differs" in refusal(run_tool("tools/inspect_data.py", copied, "--check"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ledger: ledger["tasks"][0].update(supervised_tokens=1), "task messages: samples, tokens, supervised"),
        (lambda ledger: ledger["tasks"][1].update(kept=3), "task rounds: samples"),
        (lambda ledger: ledger["tasks"][2].update(samples_in=99), "task instruction: kept and dropped"),
    ],
)
def test_check_counts_the_samples_again(copied, change, message):
    """Find a wrong sum in the ledger although every hash is right."""
    path = Path(f"{copied}_dataset.json")
    ledger = json.loads(path.read_text())
    change(ledger)
    path.write_text(json.dumps(ledger))
    assert message in refusal(run_tool("tools/inspect_data.py", copied, "--check"))


def test_inspect_refuses_a_missing_data_set(tmp_path):
    assert "no ledger nothing_dataset.json" in refusal(run_tool("tools/inspect_data.py", tmp_path / "nothing"))
    assert "missing argument" in refusal(run_tool("tools/inspect_data.py"))


def test_a_prefix_that_is_a_folder_or_below_a_file_is_refused(preprocess, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a folder" in refusal(preprocess({"t": GOOD * 3}, output_prefix=tmp_path))
    assert "is a folder" in refusal(preprocess({"t": GOOD * 3}, output_prefix=f"{tmp_path}/new/"))
    assert str(tmp_path / "file") in refusal(preprocess({"t": GOOD * 3}, output_prefix=tmp_path / "file" / "x"))


def test_a_folder_with_arrays_and_other_files(preprocess, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "b.json").write_text(json.dumps([json.loads(line) for line in RECORDS.values()], indent=1))
    (folder / "dataset_info.json").write_text('{"b": {"file_name": "b.json"}}')
    (folder / "README.md").write_text("# Data")
    words = ("--task", f"t={folder}", "--task", f"u={folder / 'b.json'}")
    process = preprocess({"a": GOOD}, *words, chat_template="mftcoder")
    assert process.returncode == 0, process.stderr
    assert "note: task t: 2 files in its folders not read: README.md, dataset_info.json\n" in process.stdout
    assert [task.kept for task in PackedDataset.open(tmp_path / "out" / "set", 64).ledger.tasks] == [1, 6, 5]
    (folder / "b.json").write_text('[{"text": "a"},\n {"text": 3}]')
    process = preprocess({"a": GOOD}, "--task", f"t={folder}")
    assert "tasks/b.json: record 2: text must be a string, not int; correct it" in refusal(process)


def test_text_that_a_terminal_cannot_show_ends_no_command(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert run_command(lambda: print("note: a key 'é'")) == 0
    assert output.buffer.getvalue() == rb"note: a key '\xe9'" + b"\n"

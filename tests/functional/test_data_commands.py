"""The data commands with every kind of input and every option that changes a packed data set.

They run in this process, through the function that their scripts call, so that no test starts an interpreter;
tests/functional/test_preprocess_command.py runs the scripts.
"""

import dataclasses
import gzip
import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from mft_megatron.data.command import inspect_main, pack_main, preprocess_main
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.errors import run_command
from tests.data.chat_templates.templates import TEMPLATES, save_tokenizer
from tests.made_dataset import batch_of_packs
from tests.ranks import ROOT

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(12)]  # fmt: skip
TEXT = [{"text": f"def f{i}(x):\n    return x + {i}\n"} for i in range(12)]


@dataclasses.dataclass
class Command:
    """The data commands, run on one folder."""

    folder: object
    tokenizer: object
    capsys: object

    def write(self, name, records):
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def run(self, main, *words):
        """Run a command; return its exit code and what it printed on both streams."""
        code = run_command(lambda: main([str(word) for word in words]))
        output = self.capsys.readouterr()
        return code, output.out + output.err

    def preprocess(self, *words, name="set", length=64):
        fixed = ("--tokenizer-model", self.tokenizer, "--seq-length", length, "--output-prefix", self.folder / name)
        return self.run(preprocess_main, *fixed, *words)

    def start_process(self, *words):
        """Start preprocessing in another process; return once some encoded batches are on disk, before it ends."""
        fixed = ("--tokenizer-model", self.tokenizer, "--tokenizer-backend", "hf", "--seq-length", "64")
        output = ("--output-prefix", self.folder / "set")
        script = [sys.executable, "tools/preprocess_data.py", *map(str, (*words, *fixed, *output))]
        process = subprocess.Popen(script, cwd=ROOT)
        deadline = time.monotonic() + 60
        while not list(self.folder.glob(".set.writing/parts/*/*.npz")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        return process

    def open(self, length=64, name="set"):
        return PackedDataset.open(self.folder / name, length, check="hashes")

    def texts(self, name="set", length=64):
        """Decode every sample; supervised text is in ⟦⟧."""
        tokenizer = load_tokenizer("HuggingFaceTokenizer", self.tokenizer)
        opened = self.open(length, name)
        texts = []
        for index in range(len(opened.tokens)):
            ids, mask = opened.tokens[index], opened.mask[index]
            borders = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(ids)]
            spans = itertools.pairwise(borders)
            parts = [(tokenizer.decode(ids[start:end].tolist()), mask[start]) for start, end in spans]
            texts.append("".join(f"⟦{part}⟧" if supervised else part for part, supervised in parts))
        return texts


@pytest.fixture
def command(tmp_path, tokenizer_folder, capsys):
    return Command(tmp_path, tokenizer_folder, capsys)


# ----------------------------------------------------------------------------------------------------------- formats


def test_every_kind_of_file_gives_the_same_samples(command):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    plain = command.write("a.jsonl", CHAT)
    (command.folder / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (command.folder / "c.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CHAT), command.folder / "d.parquet")
    files = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")
    code, output = command.preprocess(*(word for f in files for word in ("--task", f"{f[0]}={command.folder / f}")))
    assert code == 0, output
    texts = command.texts()
    assert texts[:12] * 4 == texts
    assert texts[0] == "<|im_start|>user\nSay 0.<|im_end|>\n<|im_start|>assistant\n⟦It is 0.<|im_end|>⟧\n"
    assert [task.samples_in for task in command.open().ledger.tasks] == [12] * 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl.gz", gzip.compress(b'{"text": "a b"}\n' * 500, mtime=0)[:-30]),
        ("x.jsonl.gz", b"no gzip"),
        ("x.jsonl.zst", b"no zstd"),
        ("x.parquet", b"PAR1 and nothing"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(command, name, content):
    (command.folder / name).write_bytes(content)
    code, output = command.preprocess("--task", f"t={command.folder / name}")
    assert code == 2
    assert output.startswith(f"error: {command.folder / name}")
    assert output.count("\n") == 1
    assert [path.name for path in command.folder.iterdir()] == [name]


def test_token_files_of_megatron_and_mftcoder_are_imported(command):
    code, output = command.preprocess("--task", f"t={command.write('t.jsonl', CHAT)}", "--split", "1,0,0")
    assert code == 0, output
    pair = f"{command.folder / 'set_input_ids.idx'}"
    code, output = command.preprocess("--task", f"t={pair}", "--split", "1,0,0", name="pair")
    assert code == 0, output
    assert command.texts("pair") == command.texts()
    for end in ("bin", "idx"):  # without masks it is a file of Megatron-LM
        (command.folder / f"alone.{end}").write_bytes((command.folder / f"set_input_ids.{end}").read_bytes())
    code, output = command.preprocess("--task", f"t={command.folder / 'alone.idx'}", name="plain")
    assert code == 0, output
    assert command.texts("plain") == [f"⟦{text.replace('⟦', '').replace('⟧', '')}⟧" for text in command.texts()]


def test_ids_outside_the_vocabulary_are_refused(command):
    from mft_megatron.data.storage.indexed_dataset import IndexedDatasetWriter

    size = load_tokenizer("HuggingFaceTokenizer", command.tokenizer).vocab_size
    for last, code in ((size - 1, 0), (size, 2)):
        writer = IndexedDatasetWriter(command.folder / "x.bin", command.folder / "x.idx", np.dtype(np.int32))
        writer.add(np.array([1, 2, 3, 4, last], np.int32), np.array([2, 3], np.int32))
        writer.finish()
        actual, output = command.preprocess("--task", f"t={command.folder / 'x.idx'}")
        assert actual == code, output
    assert f"x.idx: document 2: id {size}, and the tokenizer has {size}" in output


def test_a_task_file_has_options_of_each_task(command):
    command.write("chat.jsonl", CHAT)
    command.write("one.jsonl", TEXT[:6])
    command.write("two.jsonl", TEXT[6:])
    (command.folder / "task.jinja").write_text(TEMPLATE.replace("assistant\n", "helper\n"))
    tasks = {
        "chat": {"path": "chat.jsonl", "weight": 2.5, "template": "task.jinja"},
        "code": {"paths": ["one.jsonl", "two.jsonl"], "format": "text", "sampling": 2, "overlong": "split"},
    }
    (command.folder / "tasks.yaml").write_text(json.dumps(tasks))
    code, output = command.preprocess("--task-file", command.folder / "tasks.yaml", "--split", "1,0,0", length=16)
    assert code == 2  # no chat sample fits, and --overlong drops them
    assert "task chat is empty at --seq-length 16" in output
    code, output = command.preprocess("--task-file", command.folder / "tasks.yaml", "--split", "1,0,0", length=40)
    assert code == 0, output
    opened = command.open(40)
    chat, code_task = opened.ledger.tasks
    assert (chat.weight, chat.encoding["template"]) == (2.5, "task.jinja")
    assert (code_task.sampling, code_task.overlong) == (2, "split")
    assert opened.entry.tasks[1].uses == {"2": 12}
    assert "code: in one pass over the training rows, 12 used 2 times" in output
    again = command.preprocess("--task-file", command.folder / "tasks.yaml", "--task", f"code={command.folder}")
    assert again[0] == 2
    assert "--task code: the task is in" in again[1]
    (command.folder / "tasks.yaml").write_text("chat: {path: chat.jsonl, wieght: 2}")
    code, output = command.preprocess("--task-file", command.folder / "tasks.yaml")
    assert code == 2
    assert "tasks.yaml:1: task chat" in output
    assert "weight" in output


# ------------------------------------------------------------------------------------------------------------- masks


def test_the_template_of_the_tokenizer_is_used(command, tmp_path):
    folder = tmp_path / "with_template"
    folder.mkdir()
    for path in command.tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("{{ message.role }}", "{{ message.role | upper }}"))
    task = f"t={command.write('t.jsonl', CHAT)}"
    command.tokenizer = folder
    code, output = command.preprocess("--task", task)
    assert code == 0, output
    assert command.texts()[3] == "<|im_start|>USER\nSay 3.<|im_end|>\n<|im_start|>ASSISTANT\n⟦It is 3.<|im_end|>⟧\n"
    code, output = command.preprocess("--task", task, "--chat-template", "chatml")
    assert command.texts()[3].startswith("<|im_start|>user\n")
    code, output = command.preprocess("--task", task, "--chat-template", "alpaca")
    assert code == 2
    assert "--chat-template alpaca" in output


def test_what_a_reasoning_model_is_not_trained_on_is_named(command):
    """Each count is one line; a sample of each round leaves nothing out, and begins where a server's prompt ends."""
    command.tokenizer = save_tokenizer(command.folder / "thinking", TEMPLATES["thinking"])
    rounds = [
        turn
        for number in range(3)
        for turn in (
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": f"    {number}", "reasoning_content": f"It is {number}."},
        )
    ]
    tasks = ("--task", f"qa={command.write('qa.jsonl', [{'messages': rounds}] * 4)}")
    notes = {}
    for split in ((), ("--split-thinking-rounds",)):
        code, output = command.preprocess(*tasks, *split, length=128)
        assert code == 0, output
        notes[bool(split)] = [line for line in output.splitlines() if line.startswith("note: task qa")]
        (task,) = command.open(length=128).ledger.tasks
        assert task.samples_in + task.added == task.kept + sum(task.dropped.values()) == (12 if split else 4)
        code, output = command.run(inspect_main, command.folder / "set", "--check")
        assert code == 0, output
    prompt, left_out = notes[False]
    assert prompt.startswith(
        "note: task qa: a server's prompt ends in '<|im_start|>assistant\\n<think>\\n', trained answers begin after "
        "'<|im_start|>assistant\\n'; a model that thinks is given '<think>\\n' before each answer: "
    )
    assert left_out.startswith(
        "note: task qa: the template left out the reasoning of 8 answers before the last question"
    )
    assert notes[True] == [
        "note: task qa: --split-thinking-rounds made one sample a round of 4 records with reasoning in several rounds; "
        "rounds of a record may come into different splits"
    ]
    # beside a template that trims, an answer's leading spaces are named
    (command.folder / "trims.jinja").write_text(TEMPLATES["gemma"])
    spaces = [{"question": "Complete:\ndef f(x):\n", "answer": "    return 0\n"}] * 3
    words = ("--task", f"code={command.write('code.jsonl', spaces)}", "--chat-template", command.folder / "trims.jinja")
    code, output = command.preprocess(*words)
    assert code == 0, output
    assert "note: task code: the template removed leading spaces or line breaks of 3 answers; " in output
    assert command.open().ledger.tasks[0].noted == {"leading_whitespace": 3, "trailing_whitespace": 3}


def test_supervised_turns(command):
    rounds = [*CHAT[1]["messages"], {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
    excluded = [*rounds, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes.", "train": False}]
    task = f"t={command.write('t.jsonl', [{'messages': rounds}, {'messages': excluded}])}"

    def supervised(*words):
        code, output = command.preprocess("--task", task, *words, length=128)
        assert code == 0, output
        return [[part.split("⟧")[0] for part in text.split("⟦")[1:]] for text in command.texts(length=128)]

    assert supervised() == [["It is 1.<|im_end|>", "No.<|im_end|>"]] * 2
    assert supervised("--supervise", "last", "--on-error", "skip")[0] == ["No.<|im_end|>"]


def test_masks_that_must_be_a_mistake_are_refused(command):
    everything = command.write("t.jsonl", [{"prompt": "", "completion": "all of it"}] * 3)
    code, output = command.preprocess("--task", f"t={everything}")
    assert code == 2
    assert "task t" in output
    assert "every token of its samples is supervised" in output
    nothing = [{"messages": [{**turn, "train": False} for turn in record["messages"]]} for record in CHAT]
    code, output = command.preprocess("--task", f"t={command.write('t.jsonl', nothing)}", "--on-error", "skip")
    assert code == 2
    assert "is empty: 12 records, none kept" in output
    (command.folder / "without_stop.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    without_stop = ("--chat-template", command.folder / "without_stop.jinja")
    code, output = command.preprocess("--task", f"t={command.write('t.jsonl', CHAT)}", *without_stop)
    assert code == 2
    assert "no token that ends a turn is supervised" in output


def test_fill_in_the_middle(command):
    task = f"t={command.write('t.jsonl', TEXT)}"
    code, output = command.preprocess("--task", task, "--fim-rate", "1")
    assert code == 2
    assert "--fim-tokens" in output
    names = "<|im_start|>,<|im_end|>,<|pad|>"  # special tokens that these texts do not use
    code, output = command.preprocess("--task", task, "--fim-rate", 1, "--fim-spm-rate", 0, "--fim-tokens", names)
    assert code == 0, output
    for text, record in zip(command.texts(), TEXT, strict=True):
        text = text.strip("⟦⟧").removesuffix("<|endoftext|>").removeprefix("<|im_start|>")
        prefix, _, rest = text.partition("<|im_end|>")
        suffix, _, middle = rest.partition("<|pad|>")
        assert prefix + middle + suffix == record["text"]


# ----------------------------------------------------------------------------------------------- lengths and packing


def test_padded_rows_and_concatenated_documents(command):
    task = f"t={command.write('t.jsonl', TEXT)}"
    code, output = command.preprocess("--task", task, "--padding-mode", "padding", "--split", "1,0,0")
    assert code == 0, output
    assert command.open().padded
    assert command.open().split("train").num_packs == 12
    code, output = command.preprocess("--task", task, "--padding_mode", "concat", "--split", "1,0,0", length=32)
    assert code == 0, output
    split = command.open(32).split("train")
    batch = batch_of_packs(split, np.arange(split.num_packs))
    total = command.open(32).ledger.tasks[0].tokens
    assert int(batch.loss_mask_BS.sum()) == total - 1
    assert split.num_packs == -(-(total - 1) // 31)
    assert batch.num_segments == split.num_packs + (total - 1) % 31 // 31 + ((total - 1) % 31 > 0)
    code, output = command.preprocess("--task", f"t={command.write('c.jsonl', CHAT)}", "--padding-mode", "concat")
    assert code == 2
    assert "--padding-mode concat: task t is not of text alone" in output


def test_sampling_is_exact_and_reported(command):
    words = ("--task", f"a={command.write('a.jsonl', CHAT)}", "--task", f"b={command.write('b.jsonl', TEXT)}")
    code, output = command.preprocess(*words, "--task-sampling", "a=2.5", "b=0.5", "--split", "1,0,0")
    assert code == 0, output
    assert "a: in one pass over the training rows, 6 used 2 times, 6 used 3 times" in output
    assert "note: task b: sampling leaves out 6 of 12 training samples" in output
    assert command.open().entry.packs["train"].samples == 36
    code, output = command.preprocess(*words, "--task-sampling", "b=0.5", "--sampling-epochs", "2", "--split", "1,0,0")
    assert command.open().entry.tasks[1].uses == {"1": 12}
    for wrong, message in (("a=0", "--task-sampling a=0"), ("x=1", "--task-sampling x: no such task"), ("a", "give")):
        code, output = command.preprocess(*words, "--task-sampling", wrong)
        assert code == 2
        assert message in output


def test_packing_again_and_merging(command):
    chat, text = f"chat={command.write('chat.jsonl', CHAT)}", f"text={command.write('text.jsonl', TEXT)}"
    assert command.preprocess("--task", chat, "--seed", "7", "--split", "3,1,0")[0] == 0
    assert command.preprocess("--task", text, name="more")[0] == 0
    code, output = command.run(pack_main, "--data-path", command.folder / "set", "--seq-length", "48")
    assert code == 0, output
    assert command.open(48).entry.options == {**command.open(64).entry.options, "seq_length": 48}
    code, output = command.run(
        pack_main, "--data-path", command.folder / "set", command.folder / "more", "--seq-length", "32",
        "--overlong", "truncate-left", "--output-prefix", command.folder / "all",
    )  # fmt: skip
    assert code == 0, output
    assert command.open(32, "all").tasks == ("chat", "text")
    for name in ("set", "more", "all"):
        code, output = command.run(inspect_main, command.folder / name, "--check", "--histograms")
        assert code == 0, output
        assert "agrees with the ledger" in output
        assert "█" in output
    code, output = command.run(inspect_main, command.folder / "nothing")
    assert code == 2
    assert f"error: {command.folder / 'nothing'}: no ledger" in output
    for words, message in (
        ((command.folder / "set", command.folder / "more"), "give it an --output-prefix"),
        ((command.folder / "nothing",), "no ledger nothing_dataset.json"),
    ):
        code, output = command.run(pack_main, "--seq-length", "32", "--data-path", *words)
        assert code == 2
        assert message in output


def test_packing_again_keeps_the_packer(command):
    inspect = inspect_main, command.folder / "set", "--samples", "0"
    words = "--task", f"a={command.write('a.jsonl', CHAT)}", "--task", f"b={command.write('b.jsonl', TEXT)}"
    assert command.preprocess(*words, "--packer", "decreasing")[0] == 0
    again = pack_main, "--data-path", command.folder / "set", "--seq-length", "48"
    assert command.run(*again)[0] == 0
    assert [line.rpartition("filled, ")[2] for line in command.run(*inspect)[1].splitlines() if "train:" in line] == [
        "packer decreasing, order mixed",
        "packer decreasing, order mixed",
    ]
    assert command.run(*again, "--packer", "mixed")[0] == 0
    assert "packer mixed, order mixed" in command.run(*inspect)[1]
    assert command.run(*again, "--padding-mode", "padding")[0] == 0
    assert command.preprocess(*words, "--padding-mode", "padding")[0] == 0
    assert command.run(*again)[0] == 0
    code, output = command.run(*again, "--packer", "mixed")
    assert code == 2
    assert "--packer mixed: rows of --padding-mode padding are not packed; leave it out" in output


def test_check_finds_packs_that_differ_from_those_of_the_options(command):
    assert command.preprocess("--task", f"t={command.write('t.jsonl', CHAT)}")[0] == 0
    path = command.folder / "set_dataset.json"
    ledger = json.loads(path.read_text())
    ledger["lengths"]["64"]["options"]["seed"] = 99
    path.write_text(json.dumps(ledger))
    code, output = command.run(inspect_main, command.folder / "set", "--check")
    assert code == 2
    assert "does not agree with the ledger" in output


# ----------------------------------------------------------------------------------------------------- cache, backend


def test_the_cache_keeps_tokenised_batches(command):
    first = f"a={command.write('a.jsonl', CHAT)}"
    second = f"b={command.write('b.jsonl', TEXT)}"
    cache = ("--cache-dir", command.folder / "cache")
    assert "used again" not in command.preprocess("--task", first, *cache)[1]
    code, output = command.preprocess("--task", first, second, *cache)
    assert code == 0
    assert "1 batches had been tokenised before and were used again" in output


@pytest.mark.parametrize("backend", ["auto", "hf", "gigatoken"])
def test_every_backend_gives_the_same_bytes(command, backend):
    task = f"t={command.write('t.jsonl', [*CHAT, *TEXT])}"
    assert command.preprocess("--task", task, "--tokenizer-backend", "hf", name="reference")[0] == 0
    code, output = command.preprocess("--task", task, "--tokenizer-backend", backend)
    assert code == 0, output
    assert command.open().ledger.arrays == command.open(name="reference").ledger.arrays


def test_a_backend_for_another_kind_of_tokenizer_is_refused(command):
    task = f"t={command.write('t.jsonl', TEXT)}"
    code, output = command.preprocess("--task", task, "--tokenizer-backend", "sentencepiece")
    assert code == 2
    assert "--tokenizer-backend sentencepiece" in output


def test_a_killed_run_is_resumed(command):
    """Resume a process that was killed once it had encoded batches on disk."""
    words = ["--task", f"a={command.write('a.jsonl', CHAT)}", "--task", f"b={command.write('b.jsonl', TEXT * 20_000)}"]
    process = command.start_process(*words)
    process.kill()
    process.wait()
    assert not list(command.folder.glob("set*"))
    command.write("b.jsonl", TEXT)
    code, output = command.preprocess(*words, "--tokenizer-backend", "hf")
    assert code == 0, output
    assert "1 batches had been tokenised before" in output
    assert not list(command.folder.glob(".set*"))


def test_a_data_set_is_not_its_own_input(command):
    """The folder of a task may hold the data set made from it, also when that is made again."""
    folder = command.folder / "data"
    folder.mkdir()
    command.write("data/a.jsonl", CHAT)
    for _ in range(2):
        code, output = command.preprocess("--task", f"t={folder}", name="data/set")
        assert code == 0, output
        assert command.open(name="data/set").ledger.tasks[0].samples_in == 12
    code, output = command.preprocess("--task", f"t={folder / 'set_input_ids.idx'}", name="data/set")
    assert code == 2
    assert "choose another prefix" in output


def test_the_ledger_records_how_samples_were_made(command):
    task = f"t={command.write('t.jsonl', TEXT)}"
    names = "<|im_start|>,<|im_end|>,<|pad|>"
    code, output = command.preprocess("--task", task, "--fim-rate", "1", "--fim-tokens", names, "--supervise", "last")
    assert code == 0, output
    (entry,) = command.open().ledger.tasks
    assert entry.encoding["fim_rate"] == 1.0
    assert entry.encoding["fim_tokens"] == names.split(",")
    assert entry.encoding["supervise"] == "last"
    assert entry.filled == 12


def test_options_given_override_those_of_the_first_length(command):
    words = ("--task", f"t={command.write('t.jsonl', TEXT)}", "--split", "98.76543219,1.23456781,0")
    assert command.preprocess(*words, "--task-sampling", "t=2")[0] == 0
    for options, uses in (((), {"2": 11}), (("--sampling-temperature", "2"), {"1": 11})):
        code, output = command.run(
            pack_main, "--data-path", command.folder / "set", "--seq-length", "48", "--split", "11,1,0", *options
        )
        assert code == 0, output
        assert command.open(48).entry.tasks[0].uses == uses
    code, output = command.run(
        pack_main, "--data-path", command.folder / "set", "--seq-length", "32", "--padding-mode", "concat"
    )
    assert code == 0, output
    assert command.open(32).entry.options["split"] == [98.76543219, 1.23456781, 0.0]


@pytest.mark.parametrize("end", ["_task_ids.npy", "_train_packs_64.npy", "_train_packs_64_offsets.npy"])
def test_training_refuses_a_damaged_array_in_one_line(command, end):
    assert command.preprocess("--task", f"t={command.write('t.jsonl', TEXT)}")[0] == 0
    path = command.folder / f"set{end}"
    content = bytearray(path.read_bytes())
    content[:80] = bytes(80)
    path.write_bytes(content)
    code, output = command.run(lambda words: PackedDataset.open(command.folder / "set", 64))
    assert code == 2
    assert f"set{end}: damaged" in output


LEDGER_FAULTS = [
    lambda ledger: ledger.update(lengths={}),
    lambda ledger: ledger["lengths"]["64"]["options"].pop("split"),
    lambda ledger: ledger["lengths"]["64"]["options"].update(unheard_of=1),
    lambda ledger: ledger["lengths"]["64"].update(tasks=[]),
    lambda ledger: ledger.update(lengths={"abc": ledger["lengths"]["64"]}),
]


@pytest.mark.parametrize("fault", LEDGER_FAULTS)
def test_a_damaged_ledger_is_refused_in_one_line(command, fault):
    assert command.preprocess("--task", f"t={command.write('t.jsonl', TEXT)}")[0] == 0
    path = command.folder / "set_dataset.json"
    ledger = json.loads(path.read_text())
    fault(ledger)
    path.write_text(json.dumps(ledger))
    for main, words in (
        (inspect_main, (command.folder / "set", "--check")),
        (pack_main, ("--data-path", command.folder / "set", "--seq-length", "32")),
    ):
        code, output = command.run(main, *words)
        assert code == 2
        assert output.splitlines()[-1].startswith("error: ")
        assert "preprocess" in output


def test_workers_end_with_their_main_process(command):
    import psutil

    words = ["--task", f"b={command.write('b.jsonl', TEXT * 40_000)}", "--workers", "2"]
    process = command.start_process(*words)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_a_reader_may_close_the_output_early(command):
    """End quietly in ``inspect_data.py … | head -1``."""
    assert command.preprocess("--task", f"t={command.write('t.jsonl', TEXT * 50)}")[0] == 0
    inspect = [sys.executable, "tools/inspect_data.py", str(command.folder / "set"), "--samples", "500"]
    process = subprocess.Popen(inspect, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141

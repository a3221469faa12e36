"""Every way into and out of a packed data set, through the commands' own options.

The commands run in this process, through the very function that their scripts call, since each would otherwise start an
interpreter; tests/functional/test_preprocess_command.py runs the scripts.
"""

import dataclasses
import gzip
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
    """Runs commands on one folder."""

    folder: object
    tokenizer: object
    capsys: object

    def write(self, name, records):
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def run(self, main, *words):
        """Exit code, and what was said."""
        code = run_command(lambda: main([str(word) for word in words]))
        said = self.capsys.readouterr()
        return code, said.out + said.err

    def preprocess(self, *words, name="set", length=64):
        fixed = ("--tokenizer-model", self.tokenizer, "--seq-length", length, "--output-prefix", self.folder / name)
        return self.run(preprocess_main, *fixed, *words)

    def begin(self, *words):
        """A process of its own that has kept some of what it has encoded, and is not done."""
        fixed = ("--tokenizer-model", self.tokenizer, "--tokenizer-backend", "hf", "--seq-length", "64")
        output = ("--output-prefix", self.folder / "set")
        script = [sys.executable, "tools/preprocess_data.py", *map(str, (*words, *fixed, *output))]
        process = subprocess.Popen(script, cwd=ROOT)
        until = time.monotonic() + 60
        while not list(self.folder.glob(".set.writing/parts/*/*.npz")):
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.02)
        return process

    def open(self, length=64, name="set"):
        return PackedDataset.open(self.folder / name, length, check="hashes")

    def texts(self, name="set", length=64):
        """Text of each sample, what is supervised in ⟦⟧ marks."""
        tokenizer = load_tokenizer("HuggingFaceTokenizer", self.tokenizer)
        opened = self.open(length, name)
        texts = []
        for ids, mask in zip(map(opened.tokens.__getitem__, range(len(opened.tokens))), map(
            opened.mask.__getitem__, range(len(opened.tokens))), strict=True):  # fmt: skip
            borders = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(ids)]
            parts = [(tokenizer.decode(ids[a:b].tolist()), mask[a]) for a, b in zip(borders, borders[1:])]  # noqa: B905, RUF007
            texts.append("".join(f"⟦{part}⟧" if marked else part for part, marked in parts))
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
    code, said = command.preprocess(*(word for f in files for word in ("--task", f"{f[0]}={command.folder / f}")))
    assert code == 0, said
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
def test_damaged_files_are_one_line(command, name, content):
    (command.folder / name).write_bytes(content)
    code, said = command.preprocess("--task", f"t={command.folder / name}")
    assert code == 2
    assert said.startswith(f"error: {command.folder / name}")
    assert said.count("\n") == 1
    assert [path.name for path in command.folder.iterdir()] == [name]


def test_megatron_and_mftcoder_token_files_are_taken_over(command):
    code, said = command.preprocess("--task", f"t={command.write('t.jsonl', CHAT)}", "--split", "1,0,0")
    assert code == 0, said
    pair = f"{command.folder / 'set_input_ids.idx'}"
    code, said = command.preprocess("--task", f"t={pair}", "--split", "1,0,0", name="pair")
    assert code == 0, said
    assert command.texts("pair") == command.texts()
    for end in ("bin", "idx"):  # alone, without its masks, it is a file as Megatron-LM writes them
        (command.folder / f"alone.{end}").write_bytes((command.folder / f"set_input_ids.{end}").read_bytes())
    code, said = command.preprocess("--task", f"t={command.folder / 'alone.idx'}", name="plain")
    assert code == 0, said
    assert command.texts("plain") == [f"⟦{text.replace('⟦', '').replace('⟧', '')}⟧" for text in command.texts()]


def test_ids_outside_the_vocabulary_are_refused(command):
    from mft_megatron.data.storage.indexed_dataset import IndexedDatasetWriter

    size = load_tokenizer("HuggingFaceTokenizer", command.tokenizer).vocab_size
    for last, code in ((size - 1, 0), (size, 2)):
        writer = IndexedDatasetWriter(command.folder / "x.bin", command.folder / "x.idx", np.dtype(np.int32))
        writer.add(np.array([1, 2, 3, 4, last], np.int32), np.array([2, 3], np.int32))
        writer.finish()
        found, said = command.preprocess("--task", f"t={command.folder / 'x.idx'}")
        assert found == code, said
    assert f"x.idx: document 2: id {size}, and the tokenizer has {size}" in said


def test_a_task_file_sets_what_is_the_tasks_own(command):
    command.write("chat.jsonl", CHAT)
    command.write("one.jsonl", TEXT[:6])
    command.write("two.jsonl", TEXT[6:])
    (command.folder / "own.jinja").write_text(TEMPLATE.replace("assistant\n", "helper\n"))
    tasks = {
        "chat": {"path": "chat.jsonl", "weight": 2.5, "template": "own.jinja"},
        "code": {"paths": ["one.jsonl", "two.jsonl"], "format": "text", "sampling": 2, "overlong": "split"},
    }
    (command.folder / "tasks.yaml").write_text(json.dumps(tasks))
    code, said = command.preprocess("--task-file", command.folder / "tasks.yaml", "--split", "1,0,0", length=16)
    assert code == 2  # the chat samples do not fit, and keep the option's way
    assert "task chat is empty at --seq-length 16" in said
    code, said = command.preprocess("--task-file", command.folder / "tasks.yaml", "--split", "1,0,0", length=40)
    assert code == 0, said
    opened = command.open(40)
    chat, code_task = opened.ledger.tasks
    assert (chat.weight, chat.encoding["template"], code_task.sampling, code_task.overlong) == (
        2.5,
        "own.jinja",
        2,
        "split",
    )
    assert opened.entry.tasks[1].uses == {"2": 12}
    assert "code: in one pass over the training rows, 12 used 2 times" in said
    again = command.preprocess("--task-file", command.folder / "tasks.yaml", "--task", f"code={command.folder}")
    assert again[0] == 2
    assert "--task code: the task is in" in again[1]
    (command.folder / "tasks.yaml").write_text("chat: {path: chat.jsonl, wieght: 2}")
    code, said = command.preprocess("--task-file", command.folder / "tasks.yaml")
    assert code == 2
    assert "tasks.yaml:1: task chat" in said
    assert "weight" in said


# ------------------------------------------------------------------------------------------------------------- masks


def test_the_tokenizers_own_template_is_taken(command, tmp_path):
    folder = tmp_path / "with_template"
    folder.mkdir()
    for path in command.tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("{{ message.role }}", "{{ message.role | upper }}"))
    task = f"t={command.write('t.jsonl', CHAT)}"
    command.tokenizer = folder
    code, said = command.preprocess("--task", task)
    assert code == 0, said
    assert command.texts()[3] == "<|im_start|>USER\nSay 3.<|im_end|>\n<|im_start|>ASSISTANT\n⟦It is 3.<|im_end|>⟧\n"
    code, said = command.preprocess("--task", task, "--chat-template", "chatml")
    assert command.texts()[3].startswith("<|im_start|>user\n")
    code, said = command.preprocess("--task", task, "--chat-template", "alpaca")
    assert code == 2
    assert "--chat-template alpaca" in said


def test_which_turns_are_learnt(command):
    rounds = [*CHAT[1]["messages"], {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
    unlearnt = [*rounds, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes.", "train": False}]
    task = f"t={command.write('t.jsonl', [{'messages': rounds}, {'messages': unlearnt}])}"

    def learnt(*words):
        code, said = command.preprocess("--task", task, *words, length=128)
        assert code == 0, said
        return [[part.split("⟧")[0] for part in text.split("⟦")[1:]] for text in command.texts(length=128)]

    assert learnt() == [["It is 1.<|im_end|>", "No.<|im_end|>"]] * 2
    assert learnt("--supervise", "last", "--on-error", "skip")[0] == ["No.<|im_end|>"]


def test_masks_that_cannot_be_meant_are_refused(command):
    everything = command.write("t.jsonl", [{"prompt": "", "completion": "all of it"}] * 3)
    code, said = command.preprocess("--task", f"t={everything}")
    assert code == 2
    assert "task t" in said
    assert "every token of its samples is supervised" in said
    nothing = [{"messages": [{**turn, "train": False} for turn in record["messages"]]} for record in CHAT]
    code, said = command.preprocess("--task", f"t={command.write('t.jsonl', nothing)}", "--on-error", "skip")
    assert code == 2
    assert "is empty: 12 records, none kept" in said
    (command.folder / "stopless.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    stopless = ("--chat-template", command.folder / "stopless.jinja")
    code, said = command.preprocess("--task", f"t={command.write('t.jsonl', CHAT)}", *stopless)
    assert code == 2
    assert "no token that ends a turn is supervised" in said


def test_filling_in_the_middle(command):
    task = f"t={command.write('t.jsonl', TEXT)}"
    code, said = command.preprocess("--task", task, "--fim-rate", "1")
    assert code == 2
    assert "--fim-tokens" in said
    names = "<|im_start|>,<|im_end|>,<|pad|>"  # what this tokenizer has to spare
    code, said = command.preprocess("--task", task, "--fim-rate", 1, "--fim-spm-rate", 0, "--fim-tokens", names)
    assert code == 0, said
    for text, record in zip(command.texts(), TEXT, strict=True):
        text = text.strip("⟦⟧").removesuffix("<|endoftext|>").removeprefix("<|im_start|>")
        prefix, _, rest = text.partition("<|im_end|>")
        suffix, _, middle = rest.partition("<|pad|>")
        assert prefix + middle + suffix == record["text"]


# ----------------------------------------------------------------------------------------------- lengths and packing


def test_one_sample_a_row_and_joined_documents(command):
    task = f"t={command.write('t.jsonl', TEXT)}"
    code, said = command.preprocess("--task", task, "--padding-mode", "padding", "--split", "1,0,0")
    assert code == 0, said
    assert command.open().padded
    assert command.open().split("train").num_packs == 12
    code, said = command.preprocess("--task", task, "--padding_mode", "concat", "--split", "1,0,0", length=32)
    assert code == 0, said
    split = command.open(32).split("train")
    batch = batch_of_packs(split, np.arange(split.num_packs))
    total = command.open(32).ledger.tasks[0].tokens
    assert int(batch.loss_mask_BS.sum()) == total - 1
    assert split.num_packs == -(-(total - 1) // 31)
    assert batch.num_segments == split.num_packs + (total - 1) % 31 // 31 + ((total - 1) % 31 > 0)
    code, said = command.preprocess("--task", f"t={command.write('c.jsonl', CHAT)}", "--padding-mode", "concat")
    assert code == 2
    assert "--padding-mode concat: task t is not of text alone" in said


def test_sampling_is_exact_and_said(command):
    words = ("--task", f"a={command.write('a.jsonl', CHAT)}", "--task", f"b={command.write('b.jsonl', TEXT)}")
    code, said = command.preprocess(*words, "--task-sampling", "a=2.5", "b=0.5", "--split", "1,0,0")
    assert code == 0, said
    assert "a: in one pass over the training rows, 6 used 2 times, 6 used 3 times" in said
    assert "note: task b: sampling leaves out 6 of 12 training samples" in said
    assert command.open().entry.packs["train"].samples == 36
    code, said = command.preprocess(*words, "--task-sampling", "b=0.5", "--sampling-epochs", "2", "--split", "1,0,0")
    assert command.open().entry.tasks[1].uses == {"1": 12}
    for wrong, message in (("a=0", "--task-sampling a=0"), ("x=1", "--task-sampling x: no such task"), ("a", "give")):
        code, said = command.preprocess(*words, "--task-sampling", wrong)
        assert code == 2
        assert message in said


def test_packing_again_and_merging(command):
    chat, text = (f"{name}={command.write(f'{name}.jsonl', own)}" for name, own in (("chat", CHAT), ("text", TEXT)))
    assert command.preprocess("--task", chat, "--seed", "7", "--split", "3,1,0")[0] == 0
    assert command.preprocess("--task", text, name="more")[0] == 0
    code, said = command.run(pack_main, "--data-path", command.folder / "set", "--seq-length", "48")
    assert code == 0, said
    assert command.open(48).entry.options == {**command.open(64).entry.options, "seq_length": 48}
    code, said = command.run(
        pack_main, "--data-path", command.folder / "set", command.folder / "more", "--seq-length", "32",
        "--overlong", "truncate-left", "--output-prefix", command.folder / "all",
    )  # fmt: skip
    assert code == 0, said
    assert command.open(32, "all").tasks == ("chat", "text")
    for name in ("set", "more", "all"):
        code, said = command.run(inspect_main, command.folder / name, "--check", "--histograms")
        assert code == 0, said
        assert "agrees with the ledger" in said
        assert "█" in said
    for words, message in (
        ((command.folder / "set", command.folder / "more"), "give it an --output-prefix"),
        ((command.folder / "nothing",), "no ledger nothing_dataset.json"),
    ):
        code, said = command.run(pack_main, "--seq-length", "32", "--data-path", *words)
        assert code == 2
        assert message in said


def test_check_finds_packs_that_are_not_what_the_options_give(command):
    assert command.preprocess("--task", f"t={command.write('t.jsonl', CHAT)}")[0] == 0
    path = command.folder / "set_dataset.json"
    ledger = json.loads(path.read_text())
    ledger["lengths"]["64"]["options"]["seed"] = 99
    path.write_text(json.dumps(ledger))
    code, said = command.run(inspect_main, command.folder / "set", "--check")
    assert code == 2
    assert "does not agree with the ledger" in said


# ----------------------------------------------------------------------------------------------------- cache, backend


def test_a_cache_saves_what_was_tokenised(command):
    first = f"a={command.write('a.jsonl', CHAT)}"
    second = f"b={command.write('b.jsonl', TEXT)}"
    cache = ("--cache-dir", command.folder / "cache")
    assert "used again" not in command.preprocess("--task", first, *cache)[1]
    code, said = command.preprocess("--task", first, second, *cache)
    assert code == 0
    assert "1 batches had been tokenised before and were used again" in said


@pytest.mark.parametrize("backend", ["auto", "hf", "gigatoken"])
def test_every_backend_gives_the_same_bytes(command, backend):
    task = f"t={command.write('t.jsonl', [*CHAT, *TEXT])}"
    assert command.preprocess("--task", task, "--tokenizer-backend", "hf", name="reference")[0] == 0
    code, said = command.preprocess("--task", task, "--tokenizer-backend", backend)
    assert code == 0, said
    assert command.open().ledger.arrays == command.open(name="reference").ledger.arrays


def test_a_backend_for_another_kind_of_tokenizer_is_refused(command):
    task = f"t={command.write('t.jsonl', TEXT)}"
    code, said = command.preprocess("--task", task, "--tokenizer-backend", "sentencepiece")
    assert code == 2
    assert "--tokenizer-backend sentencepiece" in said


def test_a_killed_run_is_taken_up(command):
    """A real process, killed as soon as it has kept something."""
    words = ["--task", f"a={command.write('a.jsonl', CHAT)}", "--task", f"b={command.write('b.jsonl', TEXT * 20_000)}"]
    process = command.begin(*words)
    process.kill()
    process.wait()
    assert not list(command.folder.glob("set*"))
    command.write("b.jsonl", TEXT)
    code, said = command.preprocess(*words, "--tokenizer-backend", "hf")
    assert code == 0, said
    assert "1 batches had been tokenised before" in said
    assert not list(command.folder.glob(".set*"))


def test_a_data_set_is_no_source_of_itself(command):
    """A task's folder may hold the data set that is made of it, time and again."""
    folder = command.folder / "data"
    folder.mkdir()
    command.write("data/a.jsonl", CHAT)
    for _ in range(2):
        code, said = command.preprocess("--task", f"t={folder}", name="data/set")
        assert code == 0, said
        assert command.open(name="data/set").ledger.tasks[0].samples_in == 12
    code, said = command.preprocess("--task", f"t={folder / 'set_input_ids.idx'}", name="data/set")
    assert code == 2
    assert "choose another prefix" in said


def test_the_ledger_says_how_samples_were_made(command):
    task = f"t={command.write('t.jsonl', TEXT)}"
    names = "<|im_start|>,<|im_end|>,<|pad|>"
    code, said = command.preprocess("--task", task, "--fim-rate", "1", "--fim-tokens", names, "--supervise", "last")
    assert code == 0, said
    (entry,) = command.open().ledger.tasks
    assert entry.encoding["fim_rate"] == 1.0
    assert entry.encoding["fim_tokens"] == names.split(",")
    assert entry.encoding["supervise"] == "last"
    assert entry.filled == 12


def test_options_of_the_first_length_give_way_to_those_that_are_typed(command):
    words = ("--task", f"t={command.write('t.jsonl', TEXT)}", "--split", "98.76543219,1.23456781,0")
    assert command.preprocess(*words, "--task-sampling", "t=2")[0] == 0
    for options, uses in (((), {"2": 11}), (("--sampling-temperature", "2"), {"1": 11})):
        code, said = command.run(
            pack_main, "--data-path", command.folder / "set", "--seq-length", "48", "--split", "11,1,0", *options
        )
        assert code == 0, said
        assert command.open(48).entry.tasks[0].uses == uses
    code, said = command.run(
        pack_main, "--data-path", command.folder / "set", "--seq-length", "32", "--padding-mode", "concat"
    )
    assert code == 0, said
    assert command.open(32).entry.options["split"] == [98.76543219, 1.23456781, 0.0]


@pytest.mark.parametrize("end", ["_task_ids.npy", "_train_packs_64.npy", "_train_packs_64_offsets.npy"])
def test_a_damaged_array_is_one_line_when_training_opens_it(command, end):
    assert command.preprocess("--task", f"t={command.write('t.jsonl', TEXT)}")[0] == 0
    path = command.folder / f"set{end}"
    content = bytearray(path.read_bytes())
    content[:80] = bytes(80)
    path.write_bytes(content)
    code, said = command.run(lambda words: PackedDataset.open(command.folder / "set", 64))
    assert code == 2
    assert f"set{end}: damaged" in said


LEDGER_FAULTS = [
    lambda ledger: ledger.update(lengths={}),
    lambda ledger: ledger["lengths"]["64"]["options"].pop("split"),
    lambda ledger: ledger["lengths"]["64"]["options"].update(unheard_of=1),
    lambda ledger: ledger["lengths"]["64"].update(tasks=[]),
    lambda ledger: ledger.update(lengths={"abc": ledger["lengths"]["64"]}),
]


@pytest.mark.parametrize("fault", LEDGER_FAULTS)
def test_a_ledger_that_is_not_whole_is_one_line(command, fault):
    assert command.preprocess("--task", f"t={command.write('t.jsonl', TEXT)}")[0] == 0
    path = command.folder / "set_dataset.json"
    ledger = json.loads(path.read_text())
    fault(ledger)
    path.write_text(json.dumps(ledger))
    for main, words in (
        (inspect_main, (command.folder / "set", "--check")),
        (pack_main, ("--data-path", command.folder / "set", "--seq-length", "32")),
    ):
        code, said = command.run(main, *words)
        assert code == 2
        assert said.splitlines()[-1].startswith("error: ")
        assert "preprocess" in said


def test_workers_end_with_their_main_process(command):
    import psutil

    words = ["--task", f"b={command.write('b.jsonl', TEXT * 40_000)}", "--workers", "2"]
    process = command.begin(*words)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_output_may_end_early(command):
    """`inspect_data … | head -1`"""
    assert command.preprocess("--task", f"t={command.write('t.jsonl', TEXT * 50)}")[0] == 0
    inspect = [sys.executable, "tools/inspect_data.py", str(command.folder / "set"), "--samples", "500"]
    process = subprocess.Popen(inspect, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141

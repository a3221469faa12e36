"""Parts of the input that are tokenised apart give, merged, byte for byte the data set of one process."""

import dataclasses
import gzip
import io
import json
import shutil

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from mft_megatron.data.command import inspect_main, pack_main, preprocess_main
from mft_megatron.data.preprocessing.encoded_cache import read_encoded, write_encoded
from mft_megatron.data.preprocessing.part_entry import Part, parse_part, read_parts
from mft_megatron.data.storage.indexed_dataset import IndexedDatasetWriter
from mft_megatron.data.storage.ledger import read_ledger
from mft_megatron.data.tasks.reader import TaskReader
from mft_megatron.errors import InputError
from tests.data.chat_templates.templates import QWEN2, UNPROMPTED
from tests.data.conftest import TASKS, functions

CODE = functions()[:150]


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer_folder):
    """Options of a data set from every kind of file, with records that are dropped and keys that are not read."""
    folder = tmp_path_factory.mktemp("inputs")
    records = {name: make(CODE) for name, make in TASKS.items()}
    records["chat"][3]["topic"] = "functions"
    for record in records["chat"][:40:3]:
        for turn in record["messages"][2::2]:
            turn["content"] = f"<think>why</think>{turn['content']}"
    (folder / "a.jsonl").write_bytes(lines_of(records["complete"]) + b"{\n\n" + lines_of([{"text": 3}, {"text": ""}]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(records["complete"][::-1])))
    (folder / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines_of(records["chat"])))
    (folder / "d.json").write_text(json.dumps(records["rounds"]))
    parquet.write_table(pyarrow.Table.from_pylist(records["read"]), folder / "e.parquet")
    writer = IndexedDatasetWriter(folder / "f.bin", folder / "f.idx", np.dtype(np.int32))
    for length in (5, 70, 3, 90, 41):
        writer.add(np.arange(length) + 5, np.array([length], np.int32))
    writer.finish()
    writer.close()
    (folder / "own.jinja").write_text(QWEN2)
    files = {
        "code": ("a.jsonl", "b.jsonl.gz"),
        "chat": ("c.jsonl.zst", "d.json"),
        "read": ("e.parquet",),
        "f": ("f.idx",),
    }
    tasks = [word for name, paths in files.items() for path in paths for word in ("--task", f"{name}={folder / path}")]
    words = "--seq-length 96 --split 80,20,0 --overlong split --on-error skip --fim-rate 0.5 --seed 7"
    fim = ("--split-thinking-rounds", "--fim-tokens", "<|pad|>,<|im_start|>,<|im_end|>")
    options = (
        "--tokenizer-model",
        str(tokenizer_folder),
        "--chat-template",
        str(folder / "own.jinja"),
        *words.split(),
        *fim,
    )
    return [*tasks, *options]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(TaskReader.batches, "__defaults__", (3000,))


def run_part(words, prefix, part):
    preprocess_main([*words, "--output-prefix", str(prefix), "--part", part])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(inputs, tmp_path, small_batches):
    (tmp_path / "whole").mkdir()
    preprocess_main([*inputs, "--output-prefix", str(tmp_path / "whole/set")])
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_merged_parts_are_the_data_set_of_one_process(inputs, whole, tmp_path, count):
    folder = tmp_path / "parts"
    for number in reversed(range(1, count + 1)):
        run_part([*inputs, *(["--workers", "2"] if number == 3 else [])], folder / "set", f"{number}/{count}")
    assert len(contents(folder)) == 2 * count
    assert min(len(part.sizes) for part in read_parts(folder / "set")) > 5
    pack_main(["--data-path", str(folder / "set")])
    assert contents(folder) == whole
    ledger = read_ledger(folder / "set")
    assert len(ledger.tasks) == 4
    assert sum(sum(task.dropped.values()) for task in ledger.tasks) == 3
    assert ledger.tasks[1].unread_keys == {"topic": 1}
    assert ledger.tasks[1].added == ledger.tasks[1].noted["rounds_split"] > 10
    assert ledger.tasks[1].chats == ledger.tasks[1].kept
    assert len(ledger.tasks[1].examples) > 1
    assert ledger.tasks[0].filled > 20


def test_parts_that_an_interrupted_merge_left_are_deleted(inputs, tmp_path, small_batches, capsys):
    prefix = tmp_path / "set"
    for number in (1, 2):
        run_part(inputs, prefix, f"{number}/2")
    parts = contents(tmp_path)
    pack_main(["--data-path", str(prefix), "--padding-mode", "padding"])
    pack_main(["--data-path", str(prefix), "--seq-length", "64"])
    whole, ledger = contents(tmp_path), read_ledger(prefix)
    for left in (sorted(parts), [name for name in parts if "part-2" in name], ["set.part-1-of-2_part.json"]):
        for name in left:
            (tmp_path / name).write_bytes(parts[name])
        pack_main(["--data-path", str(prefix)])  # the merge's command again, without its options
        assert "merged before; " in capsys.readouterr().out
        now = contents(tmp_path)
        assert read_ledger(prefix) == ledger
        assert {**now, "set_dataset.json": whole["set_dataset.json"]} == whole
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    pack_main(["--data-path", str(prefix), "--seq-length", "48"])
    assert list(read_ledger(prefix).lengths) == ["96", "64", "48"]
    assert not parts.keys() & contents(tmp_path).keys()


def test_parts_of_other_input_than_a_newer_data_set_are_refused(inputs, tmp_path):
    other = list(inputs)
    other[other.index("--fim-rate") + 1] = "0"
    run_part(other, tmp_path / "set", "1/1")
    preprocess_main([*inputs, "--output-prefix", str(tmp_path / "set")])
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"beside the data set are older parts of other input, .* delete set_dataset"):
        pack_main(["--data-path", str(tmp_path / "set"), "--seq-length", "64"])
    assert contents(tmp_path) == before
    run_part(other, tmp_path / "set", "1/1")  # made again, they are newer and replace the data set
    pack_main(["--data-path", str(tmp_path / "set")])
    assert read_ledger(tmp_path / "set").tasks[0].filled == 0


def test_a_damaged_data_set_is_made_again_from_its_parts(inputs, tmp_path):
    prefix = tmp_path / "set"
    run_part(inputs, prefix, "1/1")
    parts = contents(tmp_path)
    pack_main(["--data-path", str(prefix)])
    whole = contents(tmp_path)
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "set_input_ids.bin").write_bytes(b"")
    pack_main(["--data-path", str(prefix)])
    assert contents(tmp_path) == whole


def test_a_part_may_be_empty(inputs, tmp_path):
    (tmp_path / "whole").mkdir()
    preprocess_main([*inputs, "--output-prefix", str(tmp_path / "whole/set")])
    for number in range(1, 9):
        run_part(inputs, tmp_path / "parts/set", f"{number}/8")
    assert [len(part.sizes) for part in read_parts(tmp_path / "parts/set")] == [1] * 6 + [0] * 2
    pack_main(["--data-path", str(tmp_path / "parts/set")])
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_the_files_of_parts_may_be_in_the_folder_of_their_task(tokenizer_folder, tmp_path):
    (tmp_path / "t.jsonl").write_bytes(lines_of(TASKS["complete"](CODE)))
    words = ["--task", f"t={tmp_path}", "--tokenizer-model", str(tokenizer_folder), "--seq-length", "99"]
    for number in (1, 2):
        run_part(words, tmp_path / "set", f"{number}/2")
    pack_main(["--data-path", str(tmp_path / "set")])
    assert read_ledger(tmp_path / "set").tasks[0].kept == len(CODE)


def test_other_packing_options_are_those_of_one_process(inputs, whole, tmp_path):
    other = [*inputs, "--seq-length", "64"]  # the last one counts
    (tmp_path / "other").mkdir()
    preprocess_main([*other, "--output-prefix", str(tmp_path / "other/set")])
    for number in (1, 2):
        run_part(inputs, tmp_path / "parts/set", f"{number}/2")
    pack_main(["--data-path", str(tmp_path / "parts/set"), "--seq-length", "64"])
    assert contents(tmp_path / "parts") == contents(tmp_path / "other")


def test_the_note_about_prompts_is_that_of_one_process(tokenizer_folder, tmp_path, small_batches, capsys):
    """Each part finds a difference in its own first chats; the first one of the whole is printed."""
    (tmp_path / "t.jsonl").write_bytes(lines_of(TASKS["chat"](CODE)))
    (tmp_path / "own.jinja").write_text(UNPROMPTED)
    words = ["--task", f"t={tmp_path / 't.jsonl'}", "--tokenizer-model", str(tokenizer_folder), "--seq-length", "99"]
    words += ["--chat-template", str(tmp_path / "own.jinja")]

    def notes():
        return [line for line in capsys.readouterr().out.splitlines() if "a server's prompt" in line]

    preprocess_main([*words, "--output-prefix", str(tmp_path / "whole")])
    (whole,) = notes()
    for number in (1, 2, 3):
        run_part(words, tmp_path / "set", f"{number}/3")
    of_parts = notes()
    assert len(set(of_parts)) == 3
    pack_main(["--data-path", str(tmp_path / "set")])
    assert notes() == [whole] == of_parts[:1]


def test_templates_named_in_one_folder_are_found_from_another(tokenizer_folder, tmp_path, monkeypatch):
    for name in ("there", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "there")
    (tmp_path / "there/t.jsonl").write_bytes(lines_of(TASKS["chat"](CODE)))
    for name in ("task", "all"):
        (tmp_path / f"there/{name}.jinja").write_text(QWEN2 + f"{{# {name} #}}")
    tasks = [{"name": "t", "path": "t.jsonl", "template": "task.jinja"}, {"name": "u", "path": "t.jsonl"}]
    (tmp_path / "there/tasks.yaml").write_text(json.dumps(tasks))
    words = ["--task-file", "tasks.yaml", "--tokenizer-model", str(tokenizer_folder), "--seq-length", "99"]
    run_part([*words, "--chat-template", "all.jinja"], tmp_path / "set", "1/1")
    monkeypatch.chdir(tmp_path / "elsewhere")
    pack_main(["--data-path", str(tmp_path / "set")])
    sources = read_ledger(tmp_path / "set").chat_template["sources"]
    assert [(source["tasks"], source["source"][-9:-3]) for source in sources] == [(["t"], "# task"), (["u"], "{# all")]


def changed_description(change):
    def edit(prefix):
        path = prefix.with_name(f"{prefix.name}.part-2-of-3_part.json")
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def damaged(prefix):
    path = prefix.with_name(f"{prefix.name}.part-2-of-3_batches.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_other_content(prefix):
    """Batches of the same sizes that can be read, as another run of the part may have left them."""
    path = prefix.with_name(f"{prefix.name}.part-2-of-3_batches.bin")
    size, content = read_parts(prefix)[1].sizes[0], path.read_bytes()
    batch = read_encoded(io.BytesIO(content[:size]), "", 0, False)
    write_encoded(other := io.BytesIO(), dataclasses.replace(batch, ids=batch.ids[::-1]), 0)
    path.write_bytes(other.getvalue() + content[size:])
    assert len(other.getvalue()) == size


def cut_off(prefix):
    path = prefix.with_name(f"{prefix.name}.part-2-of-3_batches.bin")
    path.write_bytes(path.read_bytes()[:-1])


def renamed(prefix):
    for end in ("part.json", "batches.bin"):
        names = (prefix.with_name(f"{prefix.name}.part-{number}-of-3_{end}") for number in (1, 2))
        shutil.copy(*names)


def missing(prefix):
    prefix.with_name(f"{prefix.name}.part-2-of-3_part.json").unlink()


def of_another_count(prefix):
    names = (prefix.with_name(f"{prefix.name}.part-2-of-{count}_part.json") for count in (3, 4))
    shutil.copy(*names)


WRONG_PARTS = {
    "missing": (missing, "part 2 of 3 is missing; run preprocess_data.py --part 2/3"),
    "of another job": (of_another_count, "there are parts of 3 and of 4"),
    "the same one twice": (renamed, "holds part 1 of 3"),
    "damaged": (damaged, "part-2-of-3_batches.bin: missing or damaged"),
    "of other content": (of_other_content, "part-2-of-3_batches.bin: missing or damaged"),
    "cut off": (cut_off, "part-2-of-3_batches.bin: missing or damaged"),
    "of another version": (changed_description(lambda part: part.update(format_version=0)), "a part of version 0"),
    "incomplete": (changed_description(lambda part: part.pop("sizes")), "damaged"),
    "another tokenizer": (changed_description(lambda part: part.update(tokenizer="0")), "another tokenizer"),
    "another backend": (
        changed_description(lambda part: part.update(backend="hf")),
        "tokenised by hf and part 1 by giga",
    ),
    "another rate": (
        changed_description(lambda part: part["recipe"].update(fim_rate=0.25)),
        "part 2 of 3 was made with fim_rate 0.25, and part 1 with 0.5",
    ),
    "another seed": (changed_description(lambda part: part["recipe"]["packing"].update(seed=1)), "packing seed 1, and"),
    "other tasks": (changed_description(lambda part: part["recipe"]["tasks"].pop("f")), "other tasks than part 1"),
    "another template": (
        changed_description(lambda part: part["encodings"]["chat"].update(fingerprint="0")),
        "made with chat fingerprint 0",
    ),
    "a changed file": (
        changed_description(lambda part: part["sources"]["chat"][0].update(sha256="0" * 64)),
        "c.jsonl.zst was another file",
    ),
    "another file": (
        changed_description(lambda part: part["sources"]["chat"].append(part["sources"]["chat"][0])),
        "part 2 of 3 read 3 files for task chat, and part 1 2",
    ),
    "other batches": (changed_description(lambda part: part["batches"].update(f=100)), "counts other batches"),
}


@pytest.fixture(scope="module")
def three_parts(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    for number in (1, 2, 3):
        run_part(inputs, folder / "set", f"{number}/3")
    return folder


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_parts_that_do_not_belong_together_are_refused(three_parts, tmp_path, case):
    change, message = WRONG_PARTS[case]
    shutil.copytree(three_parts, tmp_path / "parts")
    change(tmp_path / "parts/set")
    before = contents(tmp_path / "parts")
    with pytest.raises(InputError) as refusal:
        pack_main(["--data-path", str(tmp_path / "parts/set"), "--seq-length", "96"])
    assert message in str(refusal.value)
    assert contents(tmp_path / "parts") == before


def test_a_chat_template_that_changed_after_the_parts_is_refused(inputs, tmp_path):
    words = list(inputs)
    (tmp_path / "own.jinja").write_text(QWEN2)
    words[words.index("--chat-template") + 1] = str(tmp_path / "own.jinja")
    run_part(words, tmp_path / "set", "1/1")
    (tmp_path / "own.jinja").write_text(QWEN2 + "{# changed #}")
    with pytest.raises(InputError, match="a chat template has changed since the parts were made"):
        pack_main(["--data-path", str(tmp_path / "set")])


def test_a_tokenizer_that_begins_texts_otherwise_is_refused(inputs, tokenizer_folder, tmp_path):
    words = list(inputs)
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    words[words.index("--tokenizer-model") + 1] = str(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for number, name in ((1, None), (2, "CodeLlamaTokenizer")):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": name}))
        run_part(words, tmp_path / "set", f"{number}/2")
    with pytest.raises(InputError, match="part 2 of 2 was made with another tokenizer than part 1"):
        pack_main(["--data-path", str(tmp_path / "set")])


def test_what_only_the_whole_shows_is_refused_when_parts_are_merged(tokenizer_folder, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "", "completion": "a"}\n')
    words = ["--task", f"t={tmp_path / 't.jsonl'}", "--tokenizer-model", str(tokenizer_folder), "--seq-length", "16"]
    for number in (1, 2):
        run_part(words, tmp_path / "set", f"{number}/2")
    with pytest.raises(InputError, match="every token of its samples is supervised"):
        pack_main(["--data-path", str(tmp_path / "set")])
    with pytest.raises(InputError, match=r"only parts of the data set; merge them with tools/pack_data\.py"):
        inspect_main([str(tmp_path / "set")])


def test_a_record_that_cannot_be_used_stops_its_part_alone(tokenizer_folder, tmp_path, small_batches):
    (tmp_path / "t.jsonl").write_bytes(lines_of(TASKS["complete"](CODE)) + b"{\n")
    words = ["--task", f"t={tmp_path / 't.jsonl'}", "--tokenizer-model", str(tokenizer_folder), "--seq-length", "99"]
    outcomes = []
    for number in (1, 2, 3):
        try:
            run_part(words, tmp_path / "set", f"{number}/3")
        except InputError as error:
            outcomes.append(str(error))
    (outcome,) = outcomes
    assert f"t.jsonl:{len(CODE) + 1}: not JSON" in outcome
    assert len(contents(tmp_path)) == 5  # the input, and two parts


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "a/2", "1/2/3", "-1/2", "1/0", "", "1.0/2", "٣/٣"])
def test_malformed_parts_are_refused(text):
    with pytest.raises(InputError, match="give I/N with I from 1 to N"):
        parse_part(text)
    assert parse_part("3/12") == Part(3, 12)

"""Records to a data set: masks, counts, refusals, and the same result with any number of workers."""

import dataclasses
import itertools
import json
import re
import shutil
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mft_megatron.data import sample_slices
from mft_megatron.data.chat_templates.formats import chat_format
from mft_megatron.data.inspect import check
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.preprocessing import workers
from mft_megatron.data.preprocessing.encoding import Encoder, TaskEncoding
from mft_megatron.data.preprocessing.preprocess import preprocess
from mft_megatron.data.preprocessing.recipe import Recipe
from mft_megatron.data.preprocessing.repack import merge
from mft_megatron.data.records.fim import FAMILIES
from mft_megatron.data.sample_slices import supervised_tokens
from mft_megatron.data.storage.indexed_dataset import IndexedDataset
from mft_megatron.data.tasks.reader import TaskReader
from mft_megatron.data.tasks.record_batches import RecordBatch
from mft_megatron.data.tasks.task_files import TaskFiles
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.errors import InputError
from tests.data.chat_templates.templates import QWEN3, SPECIAL, save_tokenizer
from tests.data.conftest import space_before_texts, write_task


def encode(tokenizer, lines, template="chatml", first_line=1):
    encoder = Encoder(tokenizer, {"task": TaskEncoding(chat_format(template, tokenizer))})
    lines = [line if isinstance(line, bytes) else line.encode() for line in lines]
    return encoder.encode("task", RecordBatch("file", first_line, lines))


def supervised_text(tokenizer, encoded, sample=0):
    """Text of each run of supervised tokens."""
    ends = np.cumsum(encoded.lengths)
    here = slice(ends[sample] - encoded.lengths[sample], ends[sample])
    ids, mask = encoded.ids[here], encoded.mask[here]
    runs = itertools.groupby(range(len(ids)), lambda p: mask[p])
    return [tokenizer.decode([int(ids[p]) for p in run]) for supervised, run in runs if supervised]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=12) | st.sampled_from(
    ["", "\n", "  x", "<|im_end|>", "</s><s>human\n", "if x:\n\treturn  1\n"]
)


@pytest.mark.parametrize("template", ["chatml", "mftcoder"])
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=3).filter(
        lambda said: any(answer.strip() for _, answer in said) and "<image>" not in str(said)
    )
)
def test_the_mask_marks_the_answers_and_their_stop_tokens_and_nothing_else(tokenizer, template, rounds):
    messages = []
    for question, answer in rounds:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if template == "chatml" and tokenizer.token_id("<|im_end|>") is None:
        with pytest.raises(InputError, match=r"file:1: a chat record, but the tokenizer has no token <\|im_end\|>"):
            encode(tokenizer, [json.dumps({"messages": messages})], template)
        return
    encoded = encode(tokenizer, [json.dumps({"messages": messages})], template)
    stop = "<|im_end|>" if template == "chatml" else tokenizer.end_of_text
    assert supervised_text(tokenizer, encoded) == [answer + stop for _, answer in rounds if answer.strip()]


@settings(deadline=None, max_examples=60)
@given(texts.filter(lambda text: "<" not in text), texts)  # names of tokens in prompts are tested with beginnings
def test_raw_text_is_concatenated_unchanged(tokenizer, prompt, completion):
    encoded = encode(tokenizer, [json.dumps({"prompt": prompt, "completion": completion})])
    if not completion:
        assert [drop.reason for drop in encoded.drops] == ["empty_answer"]
        return
    space = space_before_texts(tokenizer)
    assert tokenizer.decode(encoded.ids) == space + prompt + completion + tokenizer.end_of_text
    learned = completion if prompt else space + completion
    assert supervised_text(tokenizer, encoded) == [learned + tokenizer.end_of_text]


def test_the_content_of_a_turn_never_ends_the_turn(tokenizer):
    answer = f"a<|im_end|>b{tokenizer.end_of_text}c"
    record = json.dumps({"instruction": answer, "output": answer})
    ids = encode(tokenizer, [record], "mftcoder").ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_question_is_tokenised_as_in_a_prompt_tokenised_whole(tokenizer):
    """The tokens of a prompt at inference are those that training had before the answer."""
    record = {"messages": [{"role": "user", "content": "  f(x);\n"}, {"role": "assistant", "content": " 1"}]}
    encoded = encode(tokenizer, [json.dumps(record)], "mftcoder")
    prompt = encoded.ids[: int(np.argmax(encoded.mask))].tolist()
    assert prompt == tokenizer.beginning.encode("<s>human\n  f(x);\n\n<s>bot\n", markup=True).tolist()


def test_tokenised_by_sample_and_by_batch_alike(tokenizer):
    lines = [json.dumps({"prompt": f"def f{i}(", "completion": "x):\n" * i}) for i in range(5)]
    together = encode(tokenizer, lines)
    alone = [encode(tokenizer, [line]) for line in lines]
    np.testing.assert_array_equal(together.ids, np.concatenate([one.ids for one in alone]))
    np.testing.assert_array_equal(together.mask, np.concatenate([one.mask for one in alone]))


BAD_LINES = {
    '{"text": "abc"': "invalid_json",
    "[" * 100_000: "invalid_json",
    '"just a string"': "unknown_shape",
    '{"body": "x"}': "unknown_shape",
    '{"text": ""}': "empty_answer",
    '{"text": "\\ud800"}': "invalid_text",
    '{"messages": [{"role": "user", "content": "a"}]}': "no_assistant_turn",
}


def test_every_line_is_accounted_for(tokenizer):
    good = '{"prompt": "a", "completion": "b"}'
    lines = ["", good, "   \t", *BAD_LINES, good]
    encoded = encode(tokenizer, lines)
    assert {drop.line: drop.reason for drop in encoded.drops} == dict(enumerate(BAD_LINES.values(), 4))
    assert [drop.line for drop in encoded.drops] == sorted(drop.line for drop in encoded.drops)
    assert encoded.records == len(encoded.lengths) + len(encoded.drops) == len(BAD_LINES) + 2


def test_bytes_that_are_no_utf8(tokenizer):
    drops = encode(tokenizer, ['{"text": "ab"}', b'{"text": "\xff"}'], first_line=41).drops
    assert [(drop.line, drop.reason) for drop in drops] == [(42, "invalid_utf8")]


@given(st.lists(st.lists(st.integers(0, 1), max_size=6), max_size=8), st.integers(1, 20))
def test_supervised_tokens_leave_out_the_first(masks, tokens_at_once):
    flat = np.array([value for mask in masks for value in mask], np.uint8)
    lengths = np.array([len(mask) for mask in masks], np.int32)
    with unittest.mock.patch.object(sample_slices, "_TOKENS_AT_ONCE", tokens_at_once):
        got = supervised_tokens(flat, lengths)
    assert got.tolist() == [sum(mask[1:]) for mask in masks]
    assert supervised_tokens(flat, lengths).tolist() == [sum(mask[1:]) for mask in masks]


# ---------------------------------------------------------------------------------------------------- the whole way


def test_the_ledger_adds_up(make_dataset):
    _, ledger = make_dataset()
    entry = ledger.lengths["256"]
    assert sum(cut.dropped.get("overlong", 0) for cut in entry.tasks) > 0
    for task, cut in zip(ledger.tasks, entry.tasks, strict=True):
        assert task.samples_in == task.kept + sum(task.dropped.values())
        assert task.samples_in == sum(source.lines for source in task.sources)
        assert task.kept == cut.kept + sum(cut.dropped.values())
        assert cut.kept == sum(cut.splits.values())
        assert all(cut.splits.values())
    for total in ("tokens", "supervised_tokens"):
        assert sum(getattr(cut, total) for cut in entry.tasks) == sum(getattr(p, total) for p in entry.packs.values())
    assert sum(cut.kept for cut in entry.tasks) == sum(packed.samples for packed in entry.packs.values())


def test_the_token_that_ends_a_middle_is_a_stop_token(make_dataset, tokenizer_folder, tmp_path):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    family = FAMILIES["CodeGemma"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([*family.tokens, family.end])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(family.end)
    records = {"t": [{"prompt": "def f", "completion": "(x): return"}] * 3}
    options = dict(records=records, tokenizer_model=str(folder), chat_template="mftcoder", split=(1.0, 0.0, 0.0))
    for rate, stops in ((0.0, [0]), (1.0, [0, end])):
        prefix, ledger = make_dataset(fim_rate=rate, **options)
        assert ledger.chat_template["stop_token_ids"] == stops
        assert ledger.tasks[0].encoding["fim_end"] == (family.end if rate else None)
        opened = PackedDataset.open(prefix, 256)
        assert {opened.tokens[sample][-1] for sample in range(3)} == {stops[-1]}
        assert {int(IndexedDataset(f"{prefix}_loss_mask")[sample][-1]) for sample in range(3)} == {1}


def test_a_ledger_with_split_rounds_adds_up(make_dataset, tmp_path):
    """Samples made by splitting are counted, so that records and samples still agree exactly."""
    template = tmp_path / "qwen3.jinja"
    template.write_text(QWEN3)
    rounds = [turn for n in range(3) for turn in ({"role": "user", "content": f"{n}?"}, thought(f"{n}"))]
    records = [
        {"messages": rounds},
        {"messages": rounds[:2]},
        {"messages": [*rounds[:2], {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"messages": [*rounds[:3], {**thought("<|im_end|>"), "content": 1}]},  # left out as a whole
        {"text": "x"},
    ] * 4
    options = dict(records={"t": records}, chat_template=str(template), on_error="skip", split=(1.0, 0.0, 0.0))
    prefix, ledger = make_dataset(split_thinking_rounds=True, **options)
    (task,) = ledger.tasks
    assert (task.samples_in, task.added, task.kept, task.dropped) == (20, 12, 28, {"wrong_type": 4})
    assert task.samples_in + task.added == task.kept + sum(task.dropped.values())
    assert task.noted == {"rounds_split": 8}
    assert task.chats == 24
    check(prefix, ledger)
    tokenizer = load_tokenizer(ledger.tokenizer.type, ledger.tokenizer.model)
    opened = PackedDataset.open(prefix, 256)
    first, second, third = (tokenizer.decode(opened.tokens[sample].tolist()) for sample in range(3))
    turn, end = "<|im_start|>{}\n{}<|im_end|>\n", "<think>\nwhy\n</think>\n\n"
    assert first == turn.format("user", "0?") + turn.format("assistant", f"{end}0")
    history = turn.format("user", "0?") + turn.format("assistant", "0") + turn.format("user", "1?")
    assert second == history + turn.format("assistant", f"{end}1")
    last = turn.format("assistant", "1") + turn.format("user", "2?") + turn.format("assistant", f"{end}2")
    assert third == history + last
    masks = IndexedDataset(f"{prefix}_loss_mask")
    learned = [tokenizer.decode(opened.tokens[n][np.asarray(masks[n]) == 1].tolist()) for n in range(3)]
    assert learned == [f"{end}{n}<|im_end|>" for n in range(3)]
    _, whole = make_dataset(**options)
    (task,) = whole.tasks
    assert (task.samples_in, task.added, task.kept) == (20, 0, 16)
    assert task.noted == {"earlier_reasoning": 12}
    # merged, the counts are sums
    merged, _ = merge([prefix, make_dataset(split_thinking_rounds=True, **options)[0]], tmp_path / "m", PACKING)
    assert (merged.tasks[0].added, merged.tasks[0].kept) == (24, 56)
    with pytest.raises(InputError, match=r"--split-thinking-rounds .* --supervise last .* leave one of them out"):
        make_dataset(split_thinking_rounds=True, supervise="last", **options)


def thought(answer):
    return {"role": "assistant", "content": answer, "reasoning_content": "why"}


PACKING = PackingOptions(seq_length=256, split=(1.0, 0.0, 0.0))


@pytest.mark.parametrize(("tokenizer_has", "chosen"), [((), "mftcoder"), (("<|im_end|>",), "chatml")])
def test_the_format_that_auto_chooses_without_a_template_is_named(make_dataset, tmp_path, tokenizer_has, chosen):
    folder = save_tokenizer(tmp_path / "tokenizer", drop=set(SPECIAL) - {"</s>", "<s>", "<|im_start|>", *tokenizer_has})
    chats = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    records = {"qa": [chats] * 3, "raw": [{"text": "x"}] * 3, "named": [chats] * 3}
    tasks = {
        name: TaskFiles(name, (write_task(tmp_path, name, lines),), template="mftcoder" if name == "named" else None)
        for name, lines in records.items()
    }
    recipe = Recipe(tasks, "HuggingFaceTokenizer", str(folder), tmp_path / "set", PACKING)
    (note,) = [note for note in preprocess(recipe)[1] if "no chat template" in note]
    opening = {
        "mftcoder": "<s>human\\n…\\n<s>bot\\n",
        "chatml": "<|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n",
    }
    assert note == (
        f"the tokenizer has no chat template, so the chats of qa are written as {chosen} does ('{opening[chosen]}'); "
        "choose another format with --chat-template"
    )
    for changed in ({"chat_template": chosen}, {"tasks": {"raw": tasks["raw"]}}):
        _, notices = preprocess(dataclasses.replace(recipe, **changed))
        assert not any("no chat template" in notice for notice in notices)


def test_truncation_keeps_every_sample_and_counts_it(make_dataset):
    dropped, truncated = (make_dataset(overlong=way)[1].lengths["256"].tasks for way in ("drop", "truncate"))
    for one, other in zip(dropped, truncated, strict=True):
        nothing_left = other.dropped.get("truncated_to_nothing", 0)
        assert one.dropped.get("overlong", 0) == other.truncated + nothing_left
        assert one.kept + one.dropped.get("overlong", 0) == other.kept + nothing_left


def files_of(prefix):
    return {path.name: path.read_bytes() for path in Path(prefix).parent.glob("set_*") if path.suffix != ".json"}


def test_the_workers_do_not_change_a_byte(make_dataset, monkeypatch):
    alone = make_dataset()[0]
    # nor does where the batches end
    monkeypatch.setattr(TaskReader.batches, "__defaults__", (3000,))
    assert files_of(make_dataset()[0]) == files_of(alone)
    assert files_of(make_dataset(workers=3)[0]) == files_of(alone)


def test_a_stop_token_that_only_the_first_batch_has_is_enough(make_dataset, monkeypatch):
    monkeypatch.setattr(TaskReader.batches, "__defaults__", (1,))  # each record is a batch
    answered, bad = {"instruction": "q", "output": "a"}, {"instruction": "q"}
    _, ledger = make_dataset({"t": [answered] * 3 + [bad]}, on_error="skip")
    assert (ledger.tasks[0].kept, ledger.tasks[0].dropped) == (3, {"unknown_shape": 1})


def test_samples_are_stored_by_task_in_the_order_of_their_files(make_dataset):
    records = {name: [{"text": f"{name} {i}"} for i in range(20)] for name in "ba"}
    prefix, ledger = make_dataset(records)
    opened = PackedDataset.open(prefix, 256)
    assert opened.tasks == ("b", "a")
    assert opened.task_ids.tolist() == [0] * 20 + [1] * 20
    decode = load_tokenizer(ledger.tokenizer.type, ledger.tokenizer.model).decode
    expected = [f"{name} {i}<|endoftext|>" for name in "ba" for i in range(20)]
    assert [decode(opened.tokens[sample].tolist()) for sample in range(40)] == expected


GOOD = [{"text": "x = 1"}] * 4


@pytest.mark.parametrize("fault", ["record", "empty", "interrupt", "disk"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_an_existing_data_set_as_it_was(make_dataset, tmp_path, monkeypatch, fault, workers):
    prefix = tmp_path / "set"
    make_dataset({"t": GOOD}, output_prefix=prefix)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    records = {"t": [*GOOD, {"text": "y = 2"}]}
    expected = InputError
    if fault == "record":
        records["u"] = [{"nothing": "known"}]
    elif fault == "empty":
        records["u"] = []
    else:
        expected = KeyboardInterrupt if fault == "interrupt" else OSError

        def fail(*_):
            raise expected

        monkeypatch.setattr("mft_megatron.data.packing.build_packs.pack_split", fail)
    with pytest.raises(expected):
        make_dataset(records, output_prefix=prefix, workers=workers)
    kept = tmp_path / ".set.writing"  # what had been tokenised when it was interrupted
    assert kept.exists() == (fault in ("interrupt", "disk"))
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != kept}
    assert after == before
    assert PackedDataset.open(str(prefix), 256, check="hashes").ledger.tasks[0].kept == 4


def test_a_failure_in_the_middle_of_publishing_leaves_no_data_set(make_dataset, tmp_path, monkeypatch):
    prefix = tmp_path / "set"
    make_dataset({"t": GOOD}, output_prefix=prefix)
    import os

    replace, moved = os.replace, []

    def fail_at_third(source, target):
        moved.append(target)
        if len(moved) == 3:
            raise OSError("disk gone")
        replace(source, target)

    monkeypatch.setattr("mft_megatron.data.storage.dataset_writer.os.replace", fail_at_third)
    with pytest.raises(OSError, match="disk gone"):
        make_dataset({"t": [*GOOD, {"text": "y"}]}, output_prefix=prefix)
    with pytest.raises(InputError, match="no ledger"):
        PackedDataset.open(str(prefix), 256)
    assert [path.name for path in tmp_path.glob(".*")] == [".set.writing"]
    assert [path.name for path in (tmp_path / ".set.writing").iterdir()] == ["parts"]  # batches to go on from


def test_no_file_of_the_replaced_data_set_is_left(make_dataset, tmp_path):
    prefix = tmp_path / "set"
    make_dataset({"t": GOOD}, output_prefix=prefix, seq_length=128, split=(1, 1, 1))
    (tmp_path / "set_notes.txt").write_text("mine")
    _, ledger = make_dataset({"t": GOOD}, output_prefix=prefix, split=(1, 0, 0))
    expected = {f"set{end}" for end in ledger.arrays} | {"set_dataset.json", "set_notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_folder_made_by_a_failed_run_is_removed(make_dataset, tmp_path):
    with pytest.raises(InputError, match="task t"):
        make_dataset({"t": []}, output_prefix=tmp_path / "new" / "deep" / "set")
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_is_reported(make_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("mft_megatron.data.preprocessing.workers._start_worker", _die)
    with pytest.raises(InputError, match="--workers: a worker process was killed"):
        make_dataset({"t": GOOD}, output_prefix=tmp_path / "set", workers=2)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_loses_no_batch_that_was_complete(make_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("mft_megatron.data.preprocessing.workers._encode_in_worker", _encode_or_die)
    monkeypatch.setattr("mft_megatron.data.preprocessing.workers.Workers.AHEAD", 0)
    tasks = {"good": GOOD, "fatal": [{"text": "fatal"}]}
    kept = f"goes on from 1 encoded batches (to give up, remove {tmp_path / '.set.writing'})"
    with pytest.raises(InputError, match=re.escape(kept)):
        make_dataset(tasks, output_prefix=tmp_path / "set", workers=2)
    assert [path.suffix for path in (tmp_path / ".set.writing").rglob("*.*")] == [".npz"]
    make_dataset(tasks, output_prefix=tmp_path / "set")
    assert not list(tmp_path.glob(".*"))


def _encode_or_die(task, batch):
    return _die() if task == "fatal" else workers._encode_in_worker(task, batch)


def _die(*_):
    import os

    os._exit(9)

"""Packing again and merging give the same bytes as preprocessing all tasks in one run."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from mft_megatron.data.command import _previous_packing
from mft_megatron.data.inspect import check
from mft_megatron.data.ledger_table import ledger_table
from mft_megatron.data.loading.dataset import PackedDataset, packed_lengths
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.preprocessing.repack import add_length, merge
from mft_megatron.data.storage.ledger import FORMAT_VERSION, read_ledger
from mft_megatron.errors import InputError

OPTIONS = PackingOptions(96, split=(80.0, 15.0, 5.0), overlong="truncate")


def files_of(prefix):
    name = Path(prefix).name
    return {path.name.removeprefix(name): path.read_bytes() for path in Path(prefix).parent.glob(f"{name}_*.*")}


def arrays_of(prefix):
    return {name: content for name, content in files_of(prefix).items() if not name.endswith(".json")}


def test_a_second_length_equals_preprocessing_for_it(make_dataset):
    prefix, before = make_dataset()
    ledger, _ = add_length(prefix, OPTIONS)
    assert packed_lengths(prefix) == [96, 256]
    assert read_ledger(prefix) == ledger
    check(prefix, ledger)
    alone, expected = make_dataset(seq_length=96, overlong="truncate")
    assert ledger.lengths["96"] == expected.lengths["96"]
    assert ledger.lengths["256"] == before.lengths["256"]
    assert ledger.dataset_hash(96) == expected.dataset_hash(96)
    assert ledger.dataset_hash(256) == before.dataset_hash(256)  # a run on the first length goes on
    found = arrays_of(prefix)
    assert {name: found[name] for name in arrays_of(alone)} == arrays_of(alone)


def test_a_length_is_replaced_and_its_old_files_are_removed(make_dataset):
    prefix, _ = make_dataset(overlong="split")
    assert any(name.endswith("_cuts.npy") for name in files_of(prefix))
    ledger, _ = add_length(prefix, PackingOptions(256, split=(1, 0, 0)))
    assert not any(name.endswith("_cuts.npy") for name in files_of(prefix))
    assert set(files_of(prefix)) == {*ledger.arrays, "_dataset.json"}
    check(prefix, ledger)


def test_a_data_set_of_an_older_version_keeps_its_packer(make_dataset):
    prefix, before = make_dataset(packer="decreasing")
    path = Path(f"{prefix}_dataset.json")
    content = json.loads(path.read_text())
    del content["lengths"]["256"]["options"]["packer"]
    path.write_text(json.dumps({**content, "format_version": 3}))
    old = read_ledger(prefix)
    check(prefix, old)
    assert old.dataset_hash(256) == before.dataset_hash(256)
    assert PackingOptions.from_entry(old.lengths["256"], prefix).packer == "decreasing"
    assert "packer decreasing" in ledger_table(old)
    options = _previous_packing({"data_path": (prefix,)})
    assert options["packer"] == "decreasing"
    files = arrays_of(prefix)
    add_length(prefix, PackingOptions.from_entry(old.lengths["256"], prefix))
    assert arrays_of(prefix) == files
    # its new entry is one that programs of version 3 cannot read
    assert json.loads(path.read_text())["format_version"] == FORMAT_VERSION
    ledger, _ = add_length(prefix, PackingOptions(256))
    assert arrays_of(prefix) != files
    assert "packer mixed" in ledger_table(ledger)
    check(prefix, ledger)


@pytest.mark.parametrize(
    ("before", "given", "kept"),
    [
        ("pack", None, "decreasing"),
        ("pack", "pack", "decreasing"),
        ("pack", "padding", None),
        ("padding", None, None),
        ("padding", "pack", None),  # nobody chose a packer
    ],
)
def test_only_a_packer_that_was_used_is_kept(make_dataset, before, given, kept):
    prefix, _ = make_dataset({"t": [{"text": "x = 1"}] * 4}, packer="decreasing", padding_mode=before)
    mode = {} if given is None else {"padding_mode": given}
    assert _previous_packing({"data_path": (prefix,), **mode}).get("packer") == kept


def test_a_data_set_with_a_damaged_file_is_not_packed_again(make_dataset):
    prefix, _ = make_dataset({"t": [{"text": "x = 1"}] * 4})
    path = Path(f"{prefix}_loss_mask.bin")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"_loss_mask\.bin: .* bytes, the ledger says"):
        add_length(prefix, OPTIONS)
    assert packed_lengths(prefix) == [256]


TASKS = {name: [{"prompt": f"{name} {i}: ", "completion": "y" * i} for i in range(1, 30)] for name in "abc"}


def test_a_merged_data_set_equals_preprocessing_all_tasks(make_dataset, tmp_path):
    first, _ = make_dataset({"a": TASKS["a"], "b": TASKS["b"]})
    second, _ = make_dataset({"c": TASKS["c"]})
    ledger, _ = merge([first, second], tmp_path / "all", OPTIONS)
    check(str(tmp_path / "all"), ledger)
    together, expected = make_dataset(TASKS, seq_length=96, overlong="truncate")
    assert arrays_of(tmp_path / "all") == arrays_of(together)
    assert ledger.lengths == expected.lengths
    for task, other in zip(ledger.tasks, expected.tasks, strict=True):
        assert dataclasses.replace(task, sources=other.sources) == other


def test_a_task_in_several_data_sets_has_the_samples_of_all(make_dataset, tmp_path):
    first, _ = make_dataset({"a": TASKS["a"], "b": TASKS["b"]})
    second, _ = make_dataset({"b": TASKS["c"], "a": TASKS["a"][:3]})
    ledger, _ = merge([first, second], tmp_path / "all", OPTIONS)
    assert [(task.name, task.kept) for task in ledger.tasks] == [("a", 32), ("b", 58)]
    opened = PackedDataset.open(tmp_path / "all", 96, check="hashes")
    one, two = (PackedDataset.open(prefix, 256) for prefix in (first, second))
    assert opened.tokens[29].tolist() == two.tokens[29].tolist()
    assert opened.tokens[32].tolist() == one.tokens[29].tolist()
    assert opened.task_ids.tolist() == [0] * 32 + [1] * 58
    check(str(tmp_path / "all"), ledger)


def test_counts_of_a_task_in_several_data_sets_are_summed(make_dataset, tmp_path):
    turns = [{"role": "developer", "content": "s"}, {"role": "user", "content": "q"}]
    answered = {"messages": [*turns, {"role": "assistant", "content": "a"}], "topic": "t"}
    halves = [answered] * 2 + [{"messages": turns}], [answered] * 3 + [{**answered, "source": "s"}]
    prefixes = [make_dataset({"a": records}, on_error="skip")[0] for records in halves]
    (merged,) = merge(prefixes, tmp_path / "all", OPTIONS)[0].tasks
    (whole,) = make_dataset({"a": halves[0] + halves[1]}, on_error="skip")[1].tasks
    assert (merged.noted, merged.unread_keys) == ({"developer_turn": 6}, {"source": 1, "topic": 6})
    assert dataclasses.replace(merged, sources=whole.sources) == whole


def test_a_ledger_without_a_later_key_is_merged_where_the_key_means_nothing(make_dataset, tmp_path):
    prefixes = [make_dataset({"a": TASKS["a"]})[0] for _ in range(2)]
    path = Path(f"{prefixes[0]}_dataset.json")
    content = json.loads(path.read_text())
    assert content["tasks"][0]["encoding"].pop("fim_end") is None
    path.write_text(json.dumps(content))
    assert merge(prefixes, tmp_path / "all", OPTIONS)[0].tasks[0].kept == 2 * 29
    content["tasks"][0]["encoding"]["fim_end"] = "<|endoftext|>"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"made with fim_end None, and with <\|endoftext\|> in a data set before it"):
        merge(prefixes, tmp_path / "other", OPTIONS)


def test_data_sets_whose_tokenizers_begin_texts_otherwise_are_not_merged(make_dataset, tokenizer_folder, tmp_path):
    def made(name, **changes):
        folder = shutil.copytree(tokenizer_folder, tmp_path / name)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
        return make_dataset({name: TASKS["a"]}, tokenizer_model=str(folder))[0]

    plain, same = made("plain"), made("same", tokenizer_class="GPT2TokenizerFast", legacy=False)
    llama, same_llama, legacy = (
        made(name, tokenizer_class="LlamaTokenizer", **changes)
        for name, changes in (("llama", {}), ("same_llama", {"legacy": False}), ("legacy", {"legacy": True}))
    )
    for number, prefixes in enumerate(([plain, same], [llama, same_llama])):
        assert len(merge(prefixes, tmp_path / f"all{number}", OPTIONS)[0].tasks) == 2
    for prefixes in ([plain, llama], [llama, legacy]):
        with pytest.raises(InputError, match=r"begins texts otherwise than that of .*; preprocess one of them again"):
            merge(prefixes, tmp_path / "other", OPTIONS)
    path = Path(f"{plain}_dataset.json")
    content = json.loads(path.read_text())
    del content["tokenizer"]["beginning_key"]  # of a data set that was made before it was known
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="begins texts otherwise"):
        merge([plain, llama, legacy], tmp_path / "other", OPTIONS)
    assert len(merge([plain, llama], tmp_path / "older", OPTIONS)[0].tasks) == 2


def test_data_sets_that_cannot_be_merged_are_refused(make_dataset, tmp_path, train_sentencepiece):
    first, _ = make_dataset({"a": TASKS["a"]})
    model = train_sentencepiece(normalization_rule_name="identity")
    other, _ = make_dataset({"b": TASKS["b"]}, tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    with pytest.raises(InputError, match="made with another tokenizer"):
        merge([first, other], tmp_path / "all", OPTIONS)
    with pytest.raises(InputError, match="is one of the data sets to merge"):
        merge([first], Path(first), OPTIONS)
    with pytest.raises(InputError, match="is given twice"):
        merge([first, f"{Path(first).parent}/./set"], tmp_path / "all", OPTIONS)
    chat = {"a": [{"instruction": "x", "output": "y"}] * 3}
    styles = [make_dataset(chat, chat_template=name)[0] for name in ("chatml", "mftcoder")]
    with pytest.raises(
        InputError, match="task a was made with template mftcoder, and with chatml in a data set before it"
    ):
        merge(styles, tmp_path / "all", OPTIONS)
    assert list(tmp_path.iterdir()) == []

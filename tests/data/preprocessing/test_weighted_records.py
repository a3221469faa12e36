"""Records with weights, from files to rows: through workers' batches, the cache, parts and rounds."""

import dataclasses
import json

import numpy as np
import pytest

from mft_megatron.data.command import inspect_main
from mft_megatron.data.inspect import check
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.preprocessing.part_entry import Part
from mft_megatron.data.preprocessing.parts import merge_parts, preprocess_part
from mft_megatron.data.preprocessing.preprocess import preprocess
from mft_megatron.data.preprocessing.recipe import Recipe
from mft_megatron.data.tasks.task_files import TaskFiles, parse_tasks
from mft_megatron.errors import InputError

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
# a record, the weight of its sample, and those of its answers
WEIGHTED = [
    ({"messages": [USER, BOT | {"weight": 0.25}, USER, BOT]}, 1, [0.25, 1]),
    ({"messages": [USER, BOT | {"weight": 0}, USER, BOT | {"weight": 3}], "weight": 0.5}, 0.5, [3]),
    ({"chat_rounds": [USER, BOT | {"loss_weight": 2}]}, 1, [2]),
    ({"conversations": [USER, BOT], "loss_scale": 3}, 3, [1]),
    ({"instruction": "q", "output": "a", "weight": 0.1}, 0.1, [1]),
    ({"question": "q", "answer": "a", "history": [["q", "a"]], "weight": 2}, 2, [1, 1]),
    ({"prompt": "q", "completion": "a", "weight": 0.7}, 0.7, [1]),
    ({"prompt": [USER, BOT, USER], "completion": [BOT | {"weight": 4}], "weight": 2}, 2, [4]),
    ({"text": "import os", "weight": 5}, 5, [1]),
    ({"messages": [USER, BOT]}, 1, [1]),
]


FIM = {"fim_tokens": "<|pad|>,<|im_start|>,<|im_end|>"}


def recipe_of(folder, tokenizer_folder, records, name="set", **options):
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    packing = PackingOptions(seq_length=64, split=(1.0, 0.0, 0.0))
    tasks = {"task": TaskFiles("task", (path,))}
    settings = {"chat_template": "chatml", "packing": packing, **options}
    return Recipe(tasks, "HuggingFaceTokenizer", str(tokenizer_folder), folder / name, **settings)


def files_of(prefix):
    return {
        path.name.removeprefix(prefix.name): path.read_bytes()
        for path in prefix.parent.glob(f"{prefix.name}_*")
        if not path.name.endswith("_dataset.json")
    }


def test_each_shape_of_records_carries_its_weights(tmp_path, tokenizer_folder):
    recipe = recipe_of(tmp_path, tokenizer_folder, [record for record, *_ in WEIGHTED])
    ledger, _ = preprocess(recipe)
    dataset = PackedDataset.open(recipe.output_prefix, 64)
    assert dataset.sample_weights.tolist() == np.array([sample for _, sample, _ in WEIGHTED], np.float32).tolist()
    for sample, (_, _, turns) in enumerate(WEIGHTED):
        mask, weights = dataset.mask[sample], dataset.token_weights[sample]
        starts = np.flatnonzero(np.diff(mask, prepend=np.uint8(0)) == 1)
        ends = np.flatnonzero(np.diff(mask, append=np.uint8(0)) == 255) + 1
        assert len(starts) == len(turns)
        reference = np.zeros(len(mask), np.float32)
        for start, end, weight in zip(starts, ends, turns, strict=True):
            reference[start:end] = weight
        assert np.array_equal(weights, reference)
    check(str(recipe.output_prefix), ledger)
    plain = recipe_of(tmp_path, tokenizer_folder, [without(record) for record, *_ in WEIGHTED], "plain")
    preprocess(plain)
    heavy, light = files_of(recipe.output_prefix), files_of(plain.output_prefix)
    assert all(
        heavy[suffix] == content for suffix, content in light.items() if "mask" not in suffix and "counts" not in suffix
    )
    assert set(heavy) - set(light) == {
        "_sample_weights.npy",
        "_token_weights.bin",
        "_token_weights.idx",
        "_train_weights_64.npy",
    }


@pytest.mark.parametrize("weight", [1, True, 1 + 1e-9])
def test_weights_that_are_all_1_in_fp32_are_stored_nowhere(tmp_path, tokenizer_folder, weight):
    records = [{"messages": [USER, BOT | {"weight": weight}, USER, BOT | {"weight": 0}], "weight": weight}]
    recipe = recipe_of(tmp_path, tokenizer_folder, records)
    ledger, _ = preprocess(recipe)
    assert not [suffix for suffix in files_of(recipe.output_prefix) if "weights" in suffix]
    assert ledger.tasks[0].weights == {}


def without(value):
    """A record without weights."""
    if isinstance(value, list):
        return [without(item) for item in value]
    if isinstance(value, dict):
        return {key: without(item) for key, item in value.items() if key not in ("weight", "loss_weight", "loss_scale")}
    return value


def test_the_cache_and_parts_keep_weights(tmp_path, tokenizer_folder):
    records = [record for record, *_ in WEIGHTED] * 3
    recipe = recipe_of(tmp_path, tokenizer_folder, records, cache_dir=tmp_path / "cache")
    preprocess(recipe)
    again = dataclasses.replace(recipe, output_prefix=tmp_path / "again")
    _, notices = preprocess(again)
    assert any("used again" in notice for notice in notices)
    parts = dataclasses.replace(recipe, output_prefix=tmp_path / "parts", cache_dir=None)
    for number in (1, 2):
        preprocess_part(parts, Part(number, 2))
    merge_parts(str(parts.output_prefix), recipe.packing)
    first = files_of(recipe.output_prefix)
    assert first == files_of(again.output_prefix) == files_of(parts.output_prefix)


def test_rounds_have_the_weights_of_their_turns_and_record(tmp_path, tokenizer_folder):
    thinks = BOT | {"content": "<think>\nr\n</think>\n\na"}
    record = {"messages": [USER, thinks | {"weight": 2}, USER, thinks | {"weight": 0.5}], "weight": 3}
    recipe = recipe_of(tmp_path, tokenizer_folder, [record], split_thinking_rounds=True, supervise="no-thinking")
    ledger, _ = preprocess(recipe)
    dataset = PackedDataset.open(recipe.output_prefix, 64)
    assert dataset.sample_weights.tolist() == [3, 3]
    assert [set(dataset.token_weights[sample].tolist()) for sample in (0, 1)] == [{0, 2}, {0, 0.5}]
    assert ledger.tasks[0].weights["samples"] == {"others": 2, "sum": 6, "min": 3, "max": 3}


def test_records_of_which_nothing_is_left_are_counted_and_stop_nothing(tmp_path, tokenizer_folder):
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    records = [{"messages": [USER, BOT]}, {"messages": [USER, call]}, {"text": "import os"}]
    ledger, _ = preprocess(recipe_of(tmp_path, tokenizer_folder, records, supervise="tool-calls-only"))
    assert (ledger.tasks[0].kept, ledger.tasks[0].dropped) == (1, {"left_out_by_supervise": 2})
    with pytest.raises(InputError, match=r"task task .* is empty: 2 records, none kept \(left_out_by_supervise 2\)"):
        preprocess(recipe_of(tmp_path, tokenizer_folder, records[::2], supervise="tool-calls-only"))
    ends_in_calls = [{"messages": [USER, call | {"content": "a"}]}]
    with pytest.raises(InputError, match="learn to stop; --supervise no-tool-calls learns no end of a call"):
        preprocess(recipe_of(tmp_path, tokenizer_folder, ends_in_calls, supervise="no-tool-calls"))
    thinks = [{"text": "<think>some reasoning</think>def f(x): return x"}]
    with pytest.raises(InputError, match="begins with <think>, and raw text has no marks"):
        preprocess(recipe_of(tmp_path, tokenizer_folder, thinks, supervise="no-thinking", fim_rate=1.0, **FIM))
    with pytest.raises(InputError, match=r"--supervise tool-calls-only leaves out raw text, .* of task task"):
        preprocess(recipe_of(tmp_path, tokenizer_folder, records, supervise="tool-calls-only", fim_rate=0.5))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "t", "weight": -1}, r"task.jsonl:2: weight must be 0 or from 1e-20 to 1e\+20, not -1; --ignore-keys"),
        ({"text": "t", "weight": float("nan")}, r"task.jsonl:2: weight must be .*, not nan"),
        ({"text": "t", "weight": "2"}, "task.jsonl:2: weight must be a number, 0 or above, not str"),
        ({"messages": [USER, BOT | {"weight": float("inf")}]}, r"task.jsonl:2: messages\[1\].weight must .*, not inf"),
        ({"text": "t", "weight": 0}, "task.jsonl:2: weight excludes the whole record from training"),
    ],
)
def test_weights_that_cannot_be_read_are_one_line_with_file_and_line(tmp_path, tokenizer_folder, record, message):
    with pytest.raises(InputError, match=message):
        preprocess(recipe_of(tmp_path, tokenizer_folder, [WEIGHTED[0][0], record]))
    assert not list(tmp_path.glob("set*"))
    ledger, _ = preprocess(recipe_of(tmp_path, tokenizer_folder, [WEIGHTED[0][0], record], on_error="skip"))
    assert sum(ledger.tasks[0].dropped.values()) == 1


def test_a_task_of_which_all_weights_are_0_is_empty(tmp_path, tokenizer_folder):
    records = [{"text": "t", "weight": 0}] * 2
    with pytest.raises(InputError, match=r"task task .* is empty: 2 records, none kept \(no_learned_turn 2\)"):
        preprocess(recipe_of(tmp_path, tokenizer_folder, records, on_error="skip"))


def test_weights_are_shown(tmp_path, tokenizer_folder, capsys):
    recipe = recipe_of(tmp_path, tokenizer_folder, [WEIGHTED[1][0]])
    preprocess(recipe)
    inspect_main([str(recipe.output_prefix), "--check"])
    shown = capsys.readouterr().out
    assert "task: 1 samples have another weight than 1 (from 0.5 to 0.5, sum 0.5); 2 tokens have another" in shown
    assert "task, sample 0: " in shown
    assert "tokens, weight 0.5" in shown
    assert "⟦a<|im_end|>⟧×3" in shown


def test_weights_beside_tokens_are_not_passed_over(tmp_path, tokenizer_folder):
    recipe = recipe_of(tmp_path, tokenizer_folder, [WEIGHTED[1][0]])
    preprocess(recipe)
    tasks = parse_tasks((f"tokens={tmp_path}/set_input_ids.idx",))
    with pytest.raises(InputError, match=r"set_sample_weights\.npy: holds weights of set_input_ids\.idx"):
        preprocess(dataclasses.replace(recipe, tasks=tasks, output_prefix=tmp_path / "again"))

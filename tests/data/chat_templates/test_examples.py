"""Examples in the ledger: their prompts are the beginnings of the stored samples that they name."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft_megatron.data.chat_templates.examples import FIRST, MOST, example_of, first_examples, moved
from mft_megatron.data.chat_templates.formats import chat_format
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.preprocessing.encoding import Encoder, TaskEncoding
from mft_megatron.data.preprocessing.repack import merge
from mft_megatron.data.records.conversation import Conversation, Turn
from mft_megatron.data.storage.indexed_dataset import IndexedDataset
from mft_megatron.data.tasks.record_batches import RecordBatch
from mft_megatron.data.tokenizers.load import load_tokenizer

OPTIONS = PackingOptions(256, split=(1, 0, 0))
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
ASKED = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
ROUNDS = [*ASKED, {"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}]
CHATS = [
    {"messages": [{"role": "user", "content": "Q"}]},  # refused: nothing is answered
    {"messages": [{"role": "user", "content": "a<|im_end|>"}, ASKED[1]]},  # a name of a token
    {"messages": [{"role": "user", "content": "long " * 2000}, ASKED[1]]},
    {"messages": ASKED},
    {"messages": [{"role": "user", "content": "another of this shape"}, ASKED[1]]},
    {"messages": [{"role": "system", "content": "S"}, *ASKED]},
    {"messages": [ROUNDS[0], {**ROUNDS[1], "train": False}, *ROUNDS[2:]]},
    {"messages": ASKED, "tools": [TOOL]},
    {"prompt": "def f(", "completion": "x):\n"},  # a fifth shape
]


def test_the_prompts_of_first_samples_are_kept_by_shape(make_dataset):
    prefix, ledger = make_dataset({"before": [{"text": "x = 1\n" * 40}] * 5, "chat": CHATS}, on_error="skip")
    document, chat = ledger.tasks
    assert document.examples == [{"sample": 0, "document": ("x = 1\n" * 40)[:200]}]
    assert [example["sample"] for example in chat.examples] == [2, 4, 5, 6]
    assert [len(example["messages"]) for example in chat.examples] == [1, 2, 3, 1]
    assert chat.examples[0]["messages"] == ASKED[:1]
    assert chat.examples[3]["tools"] == [TOOL]
    # what is before the first supervised token of the stored sample
    ids, masks = IndexedDataset(f"{prefix}_input_ids"), IndexedDataset(f"{prefix}_loss_mask")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", ledger.tokenizer.model)
    for example in chat.examples[:3]:
        index = document.kept + example["sample"]
        turns = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in example["messages"]]
        begins = int(np.argmax(masks[index]))
        assert tokenizer.decode(ids[index][:begins]) == "".join((*turns, "<|im_start|>assistant\n"))


def test_raw_prompts_and_what_is_filled_in(make_dataset):
    raw = [{"prompt": "", "completion": "y\n"}, {"prompt": "def f(", "completion": "x):\n"}]
    _, ledger = make_dataset({"raw": raw})
    assert ledger.tasks[0].examples == [{"sample": 0, "prompt": ""}]
    _, ledger = make_dataset({"raw": raw[1:] * 9}, fim_rate=1.0, fim_tokens="<|im_start|>,<|im_end|>,<|endoftext|>")
    assert ledger.tasks[0].examples == []


def test_a_cached_batch_has_its_examples(make_dataset, tmp_path):
    made = [make_dataset({"chat": CHATS}, on_error="skip", cache_dir=tmp_path)[1].tasks[0] for _ in range(2)]
    assert made[0].examples == made[1].examples != []
    assert made[0].chats == made[1].chats == 7


def test_merged_parts_have_the_examples_of_the_whole(make_dataset, tmp_path):
    parts = [make_dataset({"chat": CHATS[3:7]})[0], make_dataset({"chat": CHATS[5:]})[0]]
    merged, _ = merge(parts, tmp_path / "all", OPTIONS)
    _, whole = make_dataset({"chat": CHATS[3:7] + CHATS[5:]})
    assert merged.tasks[0].examples == whole.tasks[0].examples
    assert merged.tasks[0].chats == whole.tasks[0].chats


@pytest.mark.parametrize(("turns", "followed"), [(ASKED, None), (ROUNDS[:3], True), (ROUNDS, True)])
def test_an_answer_that_any_turn_follows_is_of_another_shape(tokenizer_folder, turns, followed):
    style = chat_format("chatml", load_tokenizer("HuggingFaceTokenizer", tokenizer_folder))
    conversation = Conversation(tuple(Turn(turn["role"], turn["content"]) for turn in turns))
    example = example_of(conversation, style, frozenset({"<s>"}))
    assert (example["messages"], example.get("followed")) == (ASKED[:1], followed)


shapes = st.sampled_from("abcdef").map(lambda role: {"messages": [{"role": role}]})


@given(samples=st.lists(shapes, max_size=50), border=st.integers(0, 50))
def test_examples_of_parts_are_those_of_the_whole(samples, border):
    numbered = [{"sample": index, **sample} for index, sample in enumerate(samples)]
    border = min(border, len(samples))
    parts = first_examples(numbered[:border]), first_examples(moved(numbered[border:], -border))
    assert first_examples([*parts[0], *moved(parts[1], border)]) == first_examples(numbered)
    seen = list(dict.fromkeys(json.dumps(sample) for sample in samples[:FIRST]))[:MOST]
    assert [json.dumps({"messages": example["messages"]}) for example in first_examples(numbered)] == seen


@pytest.mark.parametrize("sample", [FIRST - 1, FIRST])
def test_only_first_samples_are_examples(sample):
    assert bool(first_examples([{"sample": sample, "prompt": ""}])) == (sample < FIRST)


def test_a_batch_has_the_same_examples_wherever_it_is_in_a_file(tokenizer_folder):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    encoder = Encoder(tokenizer, {"chat": TaskEncoding(chat_format("chatml", tokenizer))})
    lines = [json.dumps(record).encode() for record in CHATS]
    first, later = (encoder.encode("chat", RecordBatch("a", line, lines)) for line in (1, 4097))
    assert first.examples == later.examples != []


def test_an_empty_answer_that_is_learnt_is_an_example(make_dataset):
    empty = {"messages": [ROUNDS[0], {"role": "assistant", "content": ""}]}
    _, ledger = make_dataset(
        {"chat": [empty, {"messages": [*empty["messages"], *ROUNDS[2:]]}]}, learn_empty_answers=True
    )
    (task,) = ledger.tasks
    assert task.kept == 2
    assert [example["messages"] for example in task.examples] == [ASKED[:1]] * 2
    assert [example.get("followed") for example in task.examples] == [None, True]

"""Comparison of what a server sends with what was trained: templates of families, prompts id by id, stop tokens."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from mft_megatron.convert.huggingface.chat_files import write_chat_template
from mft_megatron.convert.serving.trained_chat import (
    difference_of_ids,
    prompt_findings,
    stop_finding,
    template_finding,
)
from mft_megatron.data.chat_templates.trained_format import TrainedFormat, trained_format
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.preprocessing.preprocess import preprocess
from mft_megatron.data.preprocessing.recipe import Recipe
from mft_megatron.data.tasks.task_files import TaskFiles
from mft_megatron.run_folder.description import CheckpointInfo
from tests.data.chat_templates.templates import (
    GEMMA,
    LLAMA3,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    THINKING,
    UNPROMPTED,
    save_tokenizer,
)
from tests.data.conftest import write_task
from tests.refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
ASKED = [{"role": "user", "content": " Who\n\nis it?"}, {"role": "assistant", "content": "It is me."}]
ROUNDS = [*ASKED, {"role": "user", "content": "\nand?"}, {"role": "assistant", "content": "I am."}]
SYSTEM = [{"role": "system", "content": "Be brief.\n"}, *ASKED]
TOOL = {"type": "function", "function": {"name": "add", "description": "é", "parameters": {"type": "object"}}}
CHATS = [{"messages": ASKED}, {"messages": ROUNDS}] * 3
RAW = [{"prompt": "def f(", "completion": "x): pass"}] * 3
DOCUMENTS = [{"text": "def f(x):\n    return x\n" * 20}, {"text": "é"}]


@pytest.fixture
def made(tmp_path):
    """A function that preprocesses tasks with a tokenizer; returns prefix, ledger and the folder of the tokenizer."""

    def make(tasks, template=None, bos="<s>", **options):
        folder = save_tokenizer(tmp_path / "tokenizer", template=template, bos=bos)
        files = {name: TaskFiles(name, (write_task(tmp_path, name, records),)) for name, records in tasks.items()}
        packing = PackingOptions(512, split=(1, 0, 0))
        ledger, _ = preprocess(Recipe(files, "HuggingFaceTokenizer", str(folder), tmp_path / "set", packing, **options))
        return str(tmp_path / "set"), ledger, folder

    return make


def opened(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def exported(folder, ledger):
    """The folder as an export has it."""
    recorded = {"chat_template": dataclasses.asdict(trained_format(ledger))}
    write_chat_template(CheckpointInfo(1, 1, {}, 9, recorded, "hash", 1, 1), folder)
    return opened(folder)


def found(prefix, ledger, tokenizer):
    """Verdict and text by task."""
    findings = prompt_findings(tokenizer, prefix, ledger)
    return {finding.subject.removeprefix("prompts of "): (finding.verdict, finding.text) for finding in findings}


FAMILIES = {
    "qwen2": (QWEN2, "<s>", [{"messages": SYSTEM}, {"messages": ASKED, "tools": [TOOL]}]),
    "qwen3": (QWEN3, "<s>", [{"messages": SYSTEM}]),
    "mistral": (MISTRAL, "<s>", [{"messages": ASKED, "tools": [TOOL]}]),
    "phi3": (PHI3, "<s>", [{"messages": SYSTEM}]),
    "gemma": (GEMMA, "<bos>", []),
    "llama3": (LLAMA3, "<s>", []),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_own_template_of_a_model(made, family):
    template, bos, more = FAMILIES[family]
    prefix, ledger, folder = made({"chat": [*CHATS, *more], "raw": RAW, "read": DOCUMENTS}, template, bos)
    tokenizer = opened(folder)
    results = found(prefix, ledger, tokenizer)
    assert {name: verdict for name, (verdict, _) in results.items()} == dict.fromkeys(("chat", "raw", "read"), "ok")
    assert results["chat"][1].startswith(f"{2 + len(more)} prompts, ")
    finding = template_finding(tokenizer, trained_format(ledger), "the run")
    assert (finding.verdict, finding.text) == ("ok", "the tokenizer's template, as in the run")


MARKERS = '{"user": "### Question:\\n", "assistant": "### Answer:\\n"}'


@pytest.mark.parametrize(
    "options",
    [
        {"chat_template": "chatml"},
        {"chat_template": "mftcoder"},
        {"chat_template": "chatml", "add_bos": True},
        {"chat_template": "mftcoder", "role_markers": MARKERS, "add_bos": True},
    ],
    ids=lambda options: " ".join(map(str, options.values()))[:20],
)
@pytest.mark.parametrize("own", [None, QWEN2])
def test_a_built_in_format_is_served_from_its_export_alone(made, options, own):
    records = [*CHATS, {"messages": SYSTEM}, {"messages": ASKED, "tools": [TOOL]}]
    prefix, ledger, folder = made({"chat": records}, own, **options)
    before = opened(folder)
    if own is not None:
        verdict, text = found(prefix, ledger, before)["chat"]
        assert verdict == "wrong"
        assert text.startswith("sample 0: a server sends '")
        finding = template_finding(before, trained_format(ledger), "the run")
        assert finding.verdict == "wrong"
        assert f"the run has {options['chat_template']}: a server sends '" in finding.text
    else:
        assert "the folder has no template; export again" in template_finding(before, trained_format(ledger), "x").text
        assert found(prefix, ledger, before)["chat"][0] == "wrong"
    tokenizer = exported(folder, ledger)
    assert found(prefix, ledger, tokenizer)["chat"][0] == "ok"
    assert template_finding(tokenizer, trained_format(ledger), "the run").verdict == "ok"


@pytest.mark.parametrize(
    ("template", "difference"),
    [
        # a server opens the reasoning that the data do not have
        (THINKING, "sample 1: a server sends …'|>assistant\\n<think>\\n', trained was …'|>assistant\\n'"),
        # a server sends no beginning of an answer
        (
            UNPROMPTED,
            "sample 0: a server sends …'?<|im_end|>\\n', trained was …'?<|im_end|>\\n<|im_start|>assistant\\n'",
        ),
    ],
)
def test_a_generation_prompt_that_the_data_do_not_have(made, template, difference):
    prefix, ledger, folder = made({"chat": CHATS}, template)
    verdict, text = found(prefix, ledger, opened(folder))["chat"]
    assert (verdict, text[: len(difference)]) == ("wrong", difference)


def test_another_date_is_a_note(made):
    prefix, ledger, folder = made({"chat": [{"messages": SYSTEM}] * 3}, LLAMA3)
    verdict, text = found(prefix, ledger, opened(folder))["chat"]
    assert (verdict, text[-58:]) == ("note", "but for the date of the day, which was 26 Jul 2024 in the data"[-58:])


def test_raw_text_begins_as_a_server_sends_it(made):
    """The tokenizer of the server writes no bos token, the data have one; a document is compared at its beginning."""
    prefix, ledger, folder = made({"raw": RAW, "read": DOCUMENTS}, add_bos=True)
    results = found(prefix, ledger, opened(folder))
    assert results["raw"] == ("wrong", "sample 0: a server sends 'def f(', trained was '<s>def f('")
    assert results["read"][0] == "wrong"
    assert template_finding(opened(folder), trained_format(ledger), "x").text == "no chat was trained (x)"


def test_every_example_is_compared_with_its_own_sample(made):
    """One changed token of a prompt is found, wherever it is, and one of an answer is none."""
    records = [*CHATS, {"messages": SYSTEM}]
    prefix, ledger, folder = made({"before": RAW, "chat": records, "after": DOCUMENTS}, QWEN2)
    tokenizer = opened(folder)
    from mft_megatron.data.storage.indexed_dataset import IndexedDataset

    masks = IndexedDataset(f"{prefix}_loss_mask")
    ids = np.memmap(f"{prefix}_input_ids.bin", IndexedDataset(f"{prefix}_input_ids").items.dtype, "r+")
    for task, sample, offset, verdict in (("chat", 0, 3, "wrong"), ("chat", 6, 5, "wrong"), ("raw", 0, 0, "wrong")):
        index = {"raw": 0, "chat": len(RAW)}[task] + sample
        start = int(masks.start_of(index))
        for position, expected in ((start + offset, verdict), (start + int(np.argmax(masks[index])), "ok")):
            ids[position] += 1
            name = "before" if task == "raw" else task
            result = found(prefix, ledger, tokenizer)[name]
            assert (result[0], f"sample {sample}: " in result[1]) == (expected, expected == "wrong")
            ids[position] -= 1
    assert {verdict for verdict, _ in found(prefix, ledger, tokenizer).values()} == {"ok"}


def test_what_is_not_known(made):
    prefix, ledger, folder = made({"chat": CHATS}, QWEN2)
    tokenizer = opened(folder)
    old = dataclasses.replace(ledger, tasks=[dataclasses.replace(task, examples=[]) for task in ledger.tasks])
    assert found(prefix, old, tokenizer)["chat"][0] == "note"
    assert template_finding(tokenizer, None, "the run").verdict == "note"
    (folder.parent / "set_loss_mask.bin").unlink()
    with refused("set_loss_mask.bin: missing"):
        found(prefix, ledger, tokenizer)


def test_templates_are_compared_by_what_they_write(made):
    _, _, folder = made({"chat": CHATS}, QWEN2)
    tokenizer = opened(folder)

    def verdict(source):
        return template_finding(tokenizer, TrainedFormat("own", source), "x").verdict

    assert verdict(QWEN2) == verdict("{# another comment #}" + QWEN2) == "ok"
    assert verdict(QWEN2.replace("You help.", "You HELP.")) == "wrong"
    assert verdict(QWEN2.replace("# Tools", "# tools")) == "wrong"
    assert verdict(QWEN2 + "{{ raise_exception('no') if messages | length > 2 }}") == "wrong"
    assert verdict("{{ a.b.c }}") == "wrong"


def test_a_template_that_fails_is_named(made):
    prefix, ledger, folder = made({"chat": CHATS}, QWEN2)
    tokenizer = opened(folder)
    tokenizer.chat_template = "{{ raise_exception('not\n today') }}"
    assert found(prefix, ledger, tokenizer)["chat"] == ("wrong", "sample 0: cannot be rendered (not today)")


class Words:
    """A tokenizer of words; a word may begin with spaces, which its text does not have."""

    words = ("a", " a", "b", "▁b")

    def decode(self, ids):
        return " ".join(self.words[token].strip(" ▁") for token in ids)

    def convert_ids_to_tokens(self, ids):
        return [self.words[token] for token in ids]


@pytest.mark.parametrize(
    ("served", "trained", "expected"),
    [
        ([0, 2], [0, 0], "a server sends 'a b', trained was 'a a'"),
        ([0, 2], [0, 2, 0], "a server sends 'a b', trained was 'a b a'"),
        ([0, 3], [0, 2], "the same text in other tokens: a server sends ['a', '▁b'], trained was ['a', 'b']"),
        ([0] * 90 + [2], [0] * 91, "a server sends …'a a a a a a b', trained was …'a a a a a a a'"),
        ([2] + [0] * 90, [0] * 91, "a server sends 'b a a a a a a a a a a a a a '…, trained was 'a a a a a a a a a a"),
    ],
)
def test_the_first_difference_is_shown(served, trained, expected):
    assert difference_of_ids(Words(), served, trained)[: len(expected)] == expected


def test_stop_tokens(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [2, 3]}')
    assert stop_finding(tmp_path, [3], "the run").verdict == "ok"
    finding = stop_finding(tmp_path, [3, 7, 9], "the run")
    assert (finding.verdict, "lacks 7, 9, which ends answers of the run" in finding.text) == ("wrong", True)
    file.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert stop_finding(tmp_path, [7], "the run").verdict == "ok"
    (tmp_path / "generation_config.json").write_text("{")
    finding = stop_finding(tmp_path, [7], "the run")
    assert (finding.verdict, finding.subject) == ("wrong", "trained stop tokens")
    assert finding.text.startswith(f"not compared with the run: {tmp_path / 'generation_config.json'}: ")
    shutil.rmtree(tmp_path)

"""The tokenizer of a folder is compared with the one that was trained with: by files, and by ids where they differ."""

import json
import shutil

import pytest

from mft_megatron.convert.huggingface.chat_files import write_chat_template
from mft_megatron.convert.serving.trained_tokenizer import tokenizer_finding
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.run_folder.description import CheckpointInfo
from mft_megatron.run_folder.tokenizer import copy_tokenizer
from tests.data.chat_templates.templates import QWEN2, save_tokenizer

KIND = "HuggingFaceTokenizer"


@pytest.fixture
def found(tmp_path):
    """A function that compares a changed copy of a tokenizer with the tokenizer; returns the finding."""
    trained, folder = save_tokenizer(tmp_path / "trained", QWEN2), tmp_path / "folder"
    fingerprint = load_tokenizer(KIND, trained).fingerprint

    def found(edit, kept=(trained,)):
        shutil.copytree(trained, folder)
        edit(folder)
        return tokenizer_finding(folder, KIND, fingerprint, [tmp_path / "gone", *kept], "the run")

    return found


def rewrite(name, change):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def fewer_merges(content):
    del content["model"]["merges"][-20:]


def written_otherwise(content):
    content["model"]["merges"] = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]
    ]


def less_special(content):
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_end|>"]


def another_template(folder):
    recorded = {"chat_template": {"name": "chatml", "source": "{{ messages[0].content }}", "others": {}}}
    write_chat_template(CheckpointInfo(1, 1, {}, 9, recorded, "hash", 1, 1), folder)


def another_pad(content):
    content["pad_token"] = "<unk>"


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda folder: None, "that of the run"),
        (another_template, "that of the run"),
        (rewrite("tokenizer.json", written_otherwise), "another file than that of the run, with the same ids"),
        (rewrite("tokenizer_config.json", another_pad), "another file than that of the run, with the same ids"),
    ],
)
def test_an_equal_tokenizer(found, edit, text):
    finding = found(edit)
    assert (finding.verdict, finding.text) == ("ok", text)


def test_a_tokenizer_is_equal_after_it_was_copied_as_an_export_does(tmp_path):
    source = save_tokenizer(tmp_path / "trained", QWEN2)
    copy_tokenizer(source, tmp_path / "run")
    copy_tokenizer(tmp_path / "run", tmp_path / "exported")
    finding = tokenizer_finding(tmp_path / "exported", KIND, load_tokenizer(KIND, source).fingerprint, [], "the run")
    assert (finding.verdict, finding.text) == ("ok", "that of the run")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (rewrite("tokenizer.json", fewer_merges), " in the folder and "),
        (rewrite("tokenizer.json", less_special), "the folder's has no special token <|im_end|>; "),
        (
            rewrite("tokenizer_config.json", lambda it: it.update(eos_token="<|im_end|>")),
            "eos_token is <|im_end|> in the",
        ),
        (
            rewrite("tokenizer_config.json", lambda it: it.update(bos_token="</s>")),
            "bos_token is </s> in the folder and <s>",
        ),
    ],
)
def test_another_tokenizer(found, tmp_path, edit, words):
    finding = found(edit)
    assert finding.verdict == "wrong"
    assert words in finding.text
    assert finding.text.startswith("not that of the run: ")
    assert finding.text.endswith(f"; export again, or copy the tokenizer from {tmp_path / 'trained'}")


def test_what_cannot_be_compared_is_a_note(found, tmp_path):
    finding = found(rewrite("tokenizer.json", fewer_merges), kept=())
    assert finding.verdict == "note"
    assert "so that ids cannot be compared" in finding.text
    shutil.rmtree(tmp_path / "folder")
    finding = found(lambda folder: (folder / "tokenizer.json").write_text("{}"))
    assert finding.verdict == "note"
    assert finding.text.startswith("not compared with the run: ")

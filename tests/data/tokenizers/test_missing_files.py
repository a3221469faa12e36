"""Folders without the file of the tokenizer that was asked for: the message says what is there and what to do."""

import json
import shutil
import subprocess
import sys

import pytest

from mft_megatron.data.tokenizers.load import load_tokenizer
from tests.refusals import refused_call

HF, SPM = "HuggingFaceTokenizer", "SentencePieceTokenizer"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9085657\n"
CONVERT = "write it: python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('"
AS_SENTENCEPIECE = "has tokenizer.model and no tokenizer.json; give --tokenizer-type SentencePieceTokenizer"
DOWNLOAD = "download tokenizer.json of the model into "


@pytest.mark.parametrize(
    ("kind", "files", "reason"),
    [
        (HF, ["tokenizer.model"], AS_SENTENCEPIECE),
        (HF, ["tokenizer.model", "config.json"], AS_SENTENCEPIECE),  # transformers would make another tokenizer of it
        (HF, ["tokenizer.model", "tokenizer_config.json"], f"has tokenizer.model and no tokenizer.json; {CONVERT}"),
        (HF, ["vocab.json", "merges.txt"], f"has vocab.json and no tokenizer.json; {DOWNLOAD}"),
        (HF, ["vocab.json", "merges.txt", "config.json"], f"has vocab.json and no tokenizer.json; {CONVERT}"),
        (HF, ["vocab.json", "merges.txt", "tokenizer_config.json"], f"has vocab.json and no tokenizer.json; {CONVERT}"),
        (HF, ["tekken.json"], "has tekken.json, which is mistral-common's format, and no tokenizer.json; download"),
        (HF, ["qwen.tiktoken", "tokenizer_config.json"], "has qwen.tiktoken, which is tiktoken's format, and no tok"),
        (HF, ["README.md"], "no tokenizer.json there; give a Hugging Face folder"),
        (HF, [], "no tokenizer.json there; give a Hugging Face folder"),
        (HF, ["snapshots/4d7a/tokenizer.json"], "as it is a folder of the hub's cache; give "),
        (SPM, ["tokenizer.json"], "has tokenizer.json and no tokenizer.model; leave --tokenizer-type SentencePiece"),
        (SPM, ["vocab.json", "merges.txt"], "no tokenizer.model there; give a SentencePiece .model"),
        (SPM, ["snapshots/4d7a/tokenizer.model"], "as it is a folder of the hub's cache; give "),
    ],
)
def test_folders(tmp_path, kind, files, reason):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    line = refused_call(load_tokenizer, kind, tmp_path)
    assert f"--tokenizer-model {tmp_path}: " in line
    assert reason in line


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (HF, "tokenizer.json"),
        (HF, "tokenizer_config.json"),
        (HF, "special_tokens_map.json"),
        (HF, "chat_template.jinja"),
        (SPM, "tokenizer.model"),
        (SPM, "chat_template.jinja"),
    ],
)
def test_pointers_of_git_lfs(tokenizer_folder, sentencepiece_model, tmp_path, kind, name):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    shutil.copyfile(sentencepiece_model, folder / "tokenizer.model")
    (folder / name).write_text(POINTER)
    for path in (folder, folder / ("tokenizer.json" if kind == HF else "tokenizer.model")):
        line = refused_call(lambda path=path: load_tokenizer(kind, path).chat_template)
        assert line.startswith(f"{folder / name}: is a pointer of Git LFS, not the file itself; in its folder run 'git")


def test_files_of_the_other_kind(tokenizer_folder, sentencepiece_model):
    line = refused_call(load_tokenizer, HF, sentencepiece_model)
    assert line.endswith("; give --tokenizer-type SentencePieceTokenizer")
    line = refused_call(load_tokenizer, SPM, tokenizer_folder / "tokenizer.json")
    assert line.endswith("; leave --tokenizer-type SentencePieceTokenizer out")


def test_files_that_are_cut_off_or_too_new(tokenizer_folder, tmp_path):
    text = (tokenizer_folder / "tokenizer.json").read_text()
    file = tmp_path / "tokenizer.json"
    file.write_text(text[:-100])
    assert refused_call(load_tokenizer, HF, file).endswith("; download it again")
    content = json.loads(text)
    content["model"]["type"] = "OfTheFuture"
    file.write_text(json.dumps(content))
    line = refused_call(load_tokenizer, HF, file)
    assert line.endswith("; a newer version of the library may have written it: pip install --upgrade tokenizers")
    file.write_text("{}")
    assert refused_call(load_tokenizer, HF, file).endswith(")")


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in (HF, SPM):
        line = refused_call(load_tokenizer, kind, "org/name")
        missing = "--tokenizer-model org/name: no such file or folder"
        assert line == f"{missing}; to download it, run: hf download org/name --local-dir DIR"
        for path in ("name", "./name", "../name", "a/b/c", str(tmp_path / "name")):
            assert refused_call(load_tokenizer, kind, path) == f"--tokenizer-model {path}: no such file or folder"


@pytest.mark.slow
def test_the_command_in_the_message_writes_the_file(tokenizer_folder, tmp_path):
    model = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    line = refused_call(load_tokenizer, HF, tmp_path)
    command = line.partition(' -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", command], check=True)
    assert load_tokenizer(HF, tmp_path).encode_batch(["def f(x):"])[0]

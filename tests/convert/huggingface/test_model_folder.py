"""Files of a model besides its weights: which are kept, which belong to the tokenizer."""

import pytest

from mft_megatron.convert.huggingface.model_folder import (
    copy_files,
    copy_kept_files,
    kept_files,
    remove_tokenizer,
    same_tokenizer,
    tokenizer_files,
)

MODEL = ("LICENSE", "config.json", "generation_config.json")
TOKENIZER = (
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "merges.txt",
    "tokenization_own.py",
    "tokenizer.json",
    "vocab.json",
)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "tokenizer_cache").mkdir()  # a folder is no file of the tokenizer
    for name in (*MODEL, *TOKENIZER, "model.safetensors", "README.md", "optimizer.pt"):
        (folder / name).write_text(name)
    return folder


def names(files, folder):
    return sorted(str(file.relative_to(folder)) for file in files)


def test_configurations_tokenizer_and_licence_are_kept(model):
    assert names(kept_files(model), model) == sorted((*MODEL, *TOKENIZER))
    assert names(tokenizer_files(model), model) == sorted(TOKENIZER)


def test_copies_have_the_same_paths_and_content(model, tmp_path):
    copy_kept_files(model, tmp_path / "kept")
    assert names(kept_files(tmp_path / "kept"), tmp_path / "kept") == sorted((*MODEL, *TOKENIZER))
    assert all(file.read_text() == str(file.relative_to(tmp_path / "kept")) for file in kept_files(tmp_path / "kept"))
    copy_files(tokenizer_files(model), model, tmp_path / "tokenizer")
    assert names(kept_files(tmp_path / "tokenizer"), tmp_path / "tokenizer") == sorted(TOKENIZER)


def test_a_tokenizer_is_removed_with_its_chat_templates(model):
    remove_tokenizer(model)
    assert names(kept_files(model), model) == sorted(MODEL)
    assert not (model / "additional_chat_templates").exists()
    remove_tokenizer(model)


def test_tokenizers_are_the_same_where_the_files_that_both_have_are_equal(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    assert not same_tokenizer(model, other)
    (other / "tokenizer.json").write_text("tokenizer.json")
    assert same_tokenizer(model, other)
    (other / "vocab.json").write_text("another")
    assert not same_tokenizer(model, other)

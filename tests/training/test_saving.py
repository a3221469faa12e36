"""The tokenizer's files follow the run."""

import pytest

from mft_megatron.training.run_log import RunLog
from mft_megatron.training.saving import keep_tokenizer


@pytest.fixture
def kept(tmp_path, capsys):
    def keep(model):
        keep_tokenizer(str(tmp_path / "run"), str(model), RunLog(True))
        folder = tmp_path / "run" / "tokenizer"
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        return names, capsys.readouterr().out

    return keep


def test_a_folder_is_copied_again_and_again(kept, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert kept(tmp_path / "hf") == (["tokenizer.json"], "")
    (tmp_path / "hf" / "merges.txt").write_text("")
    assert kept(tmp_path / "hf") == (["merges.txt", "tokenizer.json"], "")


def test_of_a_model_folder_only_the_tokenizer_is_copied(kept, tmp_path):
    (tmp_path / "hf").mkdir()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "model.safetensors",
        "generation_config.json",
    ):
        (tmp_path / "hf" / name).write_text("{}")
    assert kept(tmp_path / "hf")[0] == ["tokenizer.json", "tokenizer_config.json"]


def test_a_file_brings_its_neighbours(kept, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text("{}")
    assert kept(tmp_path / "tokenizer.json")[0] == ["tokenizer.json", "tokenizer_config.json"]


def test_a_sentencepiece_model_gets_the_name_transformers_looks_for(kept, tmp_path):
    (tmp_path / "code.model").write_bytes(b"m")
    assert kept(tmp_path / "code.model") == (["tokenizer.model"], "")


def test_one_that_is_gone_is_named(kept, tmp_path):
    names, said = kept(tmp_path / "gone")
    assert names == []
    assert "gone is gone: an export of this run will need --tokenizer-model" in said

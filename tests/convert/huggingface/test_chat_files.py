"""Chat template and stop tokens of an export: what was trained is what servers find, and nothing else changes."""

import dataclasses
import json

import pytest

from mft_megatron.convert.huggingface.chat_files import (
    chat_template_of,
    stop_tokens_in,
    trained_format_of,
    write_chat_template,
    write_stop_tokens,
)
from mft_megatron.run_folder.description import CheckpointInfo
from tests.refusals import refused

OWN, TRAINED = "{{ messages }} of the tokenizer\n", "{{ messages }}\n é of the data\n"
IN_FILES = {
    "in its own file": {"chat_template.jinja": OWN, "tokenizer_config.json": '{"eos_token":   "e"}'},
    "in the configuration": {"tokenizer_config.json": json.dumps({"chat_template": OWN, "eos_token": "é"})},
    "as one of several": {
        "tokenizer_config.json": json.dumps(
            {"chat_template": [{"name": "default", "template": OWN}, {"name": "tool_use", "template": "x"}]}
        )
    },
    "in both": {"chat_template.jinja": OWN, "tokenizer_config.json": json.dumps({"chat_template": "older"})},
    "beside others": {
        "chat_template.jinja": OWN,
        "chat_template.json": "{}",
        "additional_chat_templates/tool_use.jinja": "x",
        "tokenizer_config.json": "{}",
    },
    "damaged": {"tokenizer_config.json": '{"chat_template": {"a": 1}}'},
    "nowhere": {"tokenizer_config.json": "{}"},
    "without a configuration": {"tokenizer.model": "x"},
}


def info_of(source=None, stops=None, others=None, name="mftcoder", **tokens):
    tokenizer = {"type": "HuggingFaceTokenizer", **tokens}
    if source != "unknown":
        tokenizer["chat_template"] = {"name": name, "source": source, "others": others or {}}
    if stops is not None:
        tokenizer["stop_token_ids"] = stops
    return CheckpointInfo(1, 1, {}, 9, tokenizer, "hash", 1, 1)


@pytest.fixture(params=IN_FILES)
def folder(request, tmp_path):
    for name, text in IN_FILES[request.param].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def has_own(folder):
    return chat_template_of(folder) == OWN


def test_the_template_that_was_trained_is_the_only_one(folder):
    own = has_own(folder)
    lines = write_chat_template(info_of(TRAINED), folder)
    files = files_of(folder)
    assert files["chat_template.jinja"].decode() == TRAINED
    assert files.keys() <= {"chat_template.jinja", "tokenizer_config.json", "tokenizer.model"}
    assert b"chat_template" not in files.get("tokenizer_config.json", b"")
    assert [
        line.startswith(
            "note: chat_template.jinja is the chat format that was trained (mftcoder), not the one that "
            "came with the tokenizer"
        )
        for line in lines
    ] == [True] * own


def test_the_tokenizers_own_template_changes_no_byte(folder):
    if not has_own(folder):
        (folder / "chat_template.jinja").write_text(OWN)
    before = files_of(folder)
    assert write_chat_template(info_of(OWN, name="template"), folder) == []
    assert files_of(folder) == before


@pytest.mark.parametrize(("source", "line"), [(None, ""), ("unknown", "is the one that was trained is not known")])
def test_without_a_chat_or_a_record_of_it_the_tokenizer_stays(folder, source, line):
    before = files_of(folder)
    lines = write_chat_template(info_of(source), folder)
    assert files_of(folder) == before
    assert [line in each for each in lines] == [True] * bool(line)
    assert write_chat_template(dataclasses.replace(info_of(source), tokenizer={}), folder) == []


def test_differences_are_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(OWN)
    others = {"chatml": ["a", "b"], "own.jinja": ["c"]}
    (line,) = write_chat_template(info_of(OWN, others=others), tmp_path)
    assert "most chats with mftcoder, a, b with chatml and c with own.jinja; a server has one" in line
    (line,) = write_chat_template(info_of(OWN), tmp_path, of_source="another")
    assert "not the one that came with the model" in line
    assert write_chat_template(info_of(OWN), tmp_path, of_source=OWN) == []


def test_fields_of_a_later_version_are_left_out():
    info = info_of(TRAINED)
    before = trained_format_of(info)
    info.tokenizer["chat_template"]["language"] = "of later versions"
    assert trained_format_of(info) == before
    assert before.source == TRAINED


@pytest.mark.parametrize(
    ("generation", "config", "stops", "expected"),
    [
        ('{"eos_token_id":   2}', None, [2], None),
        ('{"eos_token_id": [3,   2]}', None, [2, 3], None),
        ('{"eos_token_id": 2, "top_p": 0.8}', None, [2, 7], [2, 7]),
        ('{"eos_token_id": [5, 2]}', None, [2, 7, 9], [5, 2, 7, 9]),
        ('{"top_p": 0.8}', {"eos_token_id": 5}, [2], [5, 2]),
        ('{"eos_token_id": null}', {"eos_token_id": [5, 6]}, [6], None),
        ('{"top_p": 0.8}', {}, [2], [2]),
        ('{"top_p":   0.8}', {"eos_token_id": 5}, None, None),
        (None, {"eos_token_id": 5}, [2, 7], [2, 7]),
        (None, {"eos_token_id": 5}, None, None),
    ],
)
def test_every_stop_token_that_was_trained_is_in_the_generation_configuration(
    tmp_path, generation, config, stops, expected
):
    file = tmp_path / "generation_config.json"
    for name, text in (
        ("generation_config.json", generation),
        ("config.json", None if config is None else json.dumps(config)),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
    lines = write_stop_tokens(info_of(OWN, stops), tmp_path)
    if expected is None:
        assert (file.read_text() if file.exists() else None) == generation
        assert lines == []
        return
    assert stop_tokens_in(tmp_path) == expected
    assert json.loads(file.read_text()) == {**json.loads(generation or "{}"), "eos_token_id": expected}
    assert len(lines) == (generation is not None)


def test_stop_tokens_of_a_model_that_came_without_them(tmp_path):
    assert write_stop_tokens(info_of(OWN, [3, 7], bos_token_id=1, eos_token_id=3), tmp_path, also=[7, 8]) == []
    content = json.loads((tmp_path / "generation_config.json").read_text())
    assert content == {"bos_token_id": 1, "eos_token_id": [3, 7, 8]}
    (line,) = write_stop_tokens(info_of(OWN, [3]), tmp_path, also=[9])
    assert "stops at 9, too" in line
    assert "stops at 3, 7, 8 alone" in line


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with refused("generation_config.json: not JSON", "write it again"):
        write_stop_tokens(info_of(OWN, [3]), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with refused("tokenizer_config.json: not a JSON object"):
        write_chat_template(info_of(OWN), tmp_path)

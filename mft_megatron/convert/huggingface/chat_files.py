"""Chat template and stop tokens of an export: those that were trained, whatever the tokenizer came with."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from mft_megatron.data.chat_templates.trained_format import TrainedFormat
from mft_megatron.data.tokenizers.tokenizer_files import read_chat_template
from mft_megatron.errors import InputError
from mft_megatron.parsing.json_files import read_json_object
from mft_megatron.run_folder.description import CheckpointInfo

from .model_folder import CONFIG, GENERATION, TEMPLATES
from .stored_model import special_tokens

_JINJA, _OLD, _TOKENIZER_CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"


def trained_format_of(info: CheckpointInfo) -> TrainedFormat | None:
    """The chat format that a checkpoint was trained with; ``None`` where it is not recorded.

    Fields of later versions are left out.
    """
    recorded = info.tokenizer.get("chat_template")
    if recorded is None:
        return None
    known = {field.name for field in dataclasses.fields(TrainedFormat)}
    return TrainedFormat(**{name: value for name, value in recorded.items() if name in known})


def chat_template_of(folder: Path) -> str | None:
    """The chat template in a folder of tokenizer files; ``None`` if there is none, or none that is one text."""
    try:
        return read_chat_template(folder)
    except InputError:
        return None


def write_chat_template(info: CheckpointInfo, folder: Path, of_source: str | None = None) -> list[str]:
    """Write the template that a model was trained with, unless it is the tokenizer's own.

    Args:
        info: description of the checkpoint that was trained.
        folder: the export, with its tokenizer.
        of_source: chat template of the model that the training started from.

    Returns:
        lines that the user should read.

    Raises:
        InputError: ``tokenizer_config.json`` is damaged.
    """
    if not info.tokenizer:
        return []  # nothing was trained
    trained = trained_format_of(info)
    if trained is None:
        return [
            "note: whether the chat template of the export is the one that was trained is not known, since the data "
            "were tokens already or were preprocessed before chat formats were recorded; compare the two yourself"
        ]
    if trained.source is None:
        return []
    lines = [f"note: {trained.difference}"] if trained.difference else []
    present = chat_template_of(folder)
    if present != trained.source:
        _replace_template(folder, trained.source)
    if {present, of_source} <= {None, trained.source}:
        return lines
    return [
        *lines,
        f"note: {_JINJA} is the chat format that was trained ({trained.words}), not the one that came with the "
        f"{'tokenizer' if present not in (None, trained.source) else 'model'}",
    ]


def _replace_template(folder: Path, source: str) -> None:
    """Write a chat template, and remove every other one, which a server might take instead."""
    (folder / _OLD).unlink(missing_ok=True)
    if (folder / TEMPLATES).is_dir():
        shutil.rmtree(folder / TEMPLATES)
    file = folder / _TOKENIZER_CONFIG
    if file.is_file() and "chat_template" in (config := read_json_object(file)):
        del config["chat_template"]
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / _JINJA).write_text(source, encoding="utf-8")


def write_stop_tokens(info: CheckpointInfo, folder: Path, also: Sequence[int] = ()) -> list[str]:
    """Write the stop tokens of a model that was trained into ``generation_config.json``.

    A file that came with the model stays as it is, unless it lacks one of them.

    Args:
        info: description of the checkpoint that was trained.
        folder: the export, with its configurations.
        also: more stop tokens that were trained.

    Returns:
        lines that the user should read.

    Raises:
        InputError: ``generation_config.json`` is damaged.
    """
    # a chat model stops at the end of a turn, not only at the end of a text
    stops = list(dict.fromkeys([*(info.tokenizer.get("stop_token_ids") or []), *also]))
    file = folder / GENERATION
    if not file.is_file():
        if tokens := {**special_tokens(info), **({"eos_token_id": stops} if stops else {})}:
            file.write_text(json.dumps(tokens, indent=2) + "\n")
        return []
    content = read_json_object(file, "write it again")
    before = stop_tokens_in(folder, content)
    added = [stop for stop in stops if stop not in before]
    if not added:
        return []
    file.write_text(json.dumps({**content, "eos_token_id": [*before, *added]}, indent=2) + "\n")
    return [
        f"note: {GENERATION} stops at {_listed(added)}, too, which the model was trained to end its answers with; the "
        f"one that came with the model stops at {_listed(before) or 'no token'} alone"
    ]


def stop_tokens_in(folder: Path, generation: Mapping[str, object] | None = None) -> list[int]:
    """Stop tokens that servers read in a folder: of ``generation_config.json``, or else of ``config.json``.

    Args:
        folder: of a model or its configurations.
        generation: content of ``generation_config.json``; ``None``: it is read.

    Raises:
        InputError: a file is damaged.
    """
    if generation is None:
        file = folder / GENERATION
        generation = read_json_object(file, "write it again") if file.is_file() else {}
    eos = generation.get("eos_token_id")
    if eos is None and (folder / CONFIG).is_file():
        eos = read_json_object(folder / CONFIG, "write it again").get("eos_token_id")
    return eos if isinstance(eos, list) else [eos] if isinstance(eos, int) else []


def _listed(tokens: Sequence[int]) -> str:
    return ", ".join(map(str, tokens))

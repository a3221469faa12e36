"""What a Hugging Face folder holds besides weights, and how it is kept byte by byte until a model is exported again."""

import json
import shutil
from pathlib import Path
from typing import Any

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.families.table import family_of
from mft_megatron.errors import InputError
from mft_megatron.run_folder import TOKENIZER_FILES

from .config_entries.entry import whole_number
from .family import Family

CONFIG = "config.json"
GENERATION = "generation_config.json"
_KEPT = (CONFIG, GENERATION, *TOKENIZER_FILES)
_KEPT_BEGINNINGS = ("tokenizer", "tokenization_", "chat_template", "LICENSE", "NOTICE")
_FOLDERS = ("additional_chat_templates",)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        InputError: it is missing or no JSON object.
    """
    file = folder / CONFIG
    if not file.is_file():
        what = f"has no {CONFIG}; give the folder of a model" if folder.is_dir() else "is no folder"
        raise InputError(f"{folder}: {what}")
    return read_object(file, "download it again")


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """The content of a JSON file that is an object.

    Raises:
        InputError: it is none; with the remedy.
    """
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a JSON object; {remedy}")
    return content


def read_architecture(folder: Path) -> tuple[Family, NetworkArguments, int]:
    """What ``config.json`` describes: family, architecture and size of the vocabulary.

    Raises:
        InputError: it cannot be expressed here; in a line that names the entry.
    """
    config = read_config(folder)
    try:
        family = family_of(config)
        return family, family.read_config(config), whole_number(config, "vocab_size")
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None


def keep(source: Path, target: Path) -> None:
    """Copy everything that is to be given back with the weights into the folder ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    for file in kept(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def kept(source: Path) -> list[Path]:
    """Configurations, tokenizer, chat templates and licence of a model."""
    found = [
        file
        for file in sorted(source.iterdir())
        if file.is_file() and (file.name in _KEPT or file.name.startswith(_KEPT_BEGINNINGS))
    ]
    return found + [file for name in _FOLDERS for file in sorted((source / name).glob("*")) if file.is_file()]


def is_of_tokenizer(file: Path) -> bool:
    """Whether a kept file belongs to the tokenizer rather than to the model."""
    return file.name in TOKENIZER_FILES or file.name.startswith(("tokenizer", "tokenization_", "chat_template"))


def same_tokenizer(source: Path, other: Path) -> bool:
    """Whether the tokenizer files of two folders are the same, as far as both have them."""
    both = [name for name in TOKENIZER_FILES if (source / name).is_file() and (other / name).is_file()]
    return bool(both) and all((source / name).read_bytes() == (other / name).read_bytes() for name in both)

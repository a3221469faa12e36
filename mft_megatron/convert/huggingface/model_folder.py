"""Files of a Hugging Face model besides its weights: read, and kept byte by byte until the model is exported again."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.families.table import family_of, note_on_unread
from mft_megatron.errors import InputError
from mft_megatron.parsing.git_lfs import refuse_pointer
from mft_megatron.parsing.json_files import read_json_object
from mft_megatron.parsing.links import refuse_odd_link
from mft_megatron.run_folder.names import INFO, TRACKER
from mft_megatron.run_folder.tokenizer import TOKENIZER_FILES

from .config_entries.entry import whole_number
from .family import Family

CONFIG = "config.json"
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"
_TOKENIZER_PREFIXES = ("tokenizer", "tokenization_", "chat_template")
_KEPT = (CONFIG, GENERATION, *TOKENIZER_FILES)
_KEPT_PREFIXES = (*_TOKENIZER_PREFIXES, "LICENSE", "NOTICE")


def read_config(folder: Path) -> dict[str, object]:
    """Read ``config.json``.

    Raises:
        InputError: the file is missing or not a JSON object.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise InputError(f"{folder}: {_no_config(folder)}")
    return read_json_object(file, "download it again")


def _no_config(folder: Path) -> str:
    """Why a folder has no ``config.json``, and what to do."""
    if folder.is_file():
        return f"is a file; give its folder, {folder.parent}"
    if not folder.is_dir():
        # a name on the hub has one slash and begins neither here nor at the root
        hub = len(folder.parts) == 2 and not folder.is_absolute() and folder.parts[0] not in (".", "..")
        return f"is no folder{f'; to download it, run: hf download {folder} --local-dir DIR' if hub else ''}"
    if snapshots := sorted(folder.glob(f"snapshots/*/{CONFIG}")):
        return f"has no {CONFIG}, as it is a folder of the hub's cache; give {snapshots[-1].parent}"
    if exports := sorted(folder.glob(f"iter_*/{CONFIG}")):
        return f"has no {CONFIG}, as it holds the exports of a run; give one of them, such as {exports[-1].parent}"
    if (folder / TRACKER).is_file() or (folder / INFO).is_file():
        return f"has no {CONFIG}, as it holds checkpoints; export one with convert_checkpoint.py mcore-to-hf --load"
    return f"has no {CONFIG}; give the folder of a model"


def read_architecture(folder: Path) -> tuple[Family, NetworkArguments, int]:
    """Read family, architecture and vocabulary size from ``config.json``.

    Raises:
        InputError: an entry cannot be expressed; the message names it.
    """
    config = read_config(folder)
    try:
        family = family_of(config)
        return family, family.read_config(config), whole_number(config, "vocab_size")
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None


def unread_entries(folder: Path) -> str | None:
    """Name the entries of ``config.json`` that are not read, for a note to the user; ``None`` without any.

    Args:
        folder: of a model that :func:`read_architecture` accepts.
    """
    config = read_config(folder)
    note = note_on_unread(config, family_of(config))
    return None if note is None else f"{folder / CONFIG}: {note}"


def kept_files(folder: Path) -> list[Path]:
    """Configurations, tokenizer, chat templates and licence of a model, in a fixed order.

    Raises:
        InputError: one of them is a pointer of Git LFS, or a link to a file elsewhere.
    """
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and (file.name in _KEPT or file.name.startswith(_KEPT_PREFIXES))
    ]
    files += [file for file in sorted((folder / TEMPLATES).glob("*")) if file.is_file()]
    for file in files:
        refuse_pointer(file)
        refuse_odd_link(file)
    return files


def tokenizer_files(folder: Path) -> list[Path]:
    """The kept files that belong to the tokenizer, chat templates included."""
    return [
        file
        for file in kept_files(folder)
        if file.name in TOKENIZER_FILES or file.name.startswith(_TOKENIZER_PREFIXES) or file.parent != folder
    ]


def copy_files(files: Iterable[Path], source: Path, target: Path) -> None:
    """Copy files of the folder ``source`` to the same relative paths in ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def copy_kept_files(source: Path, target: Path) -> None:
    """Copy everything that an export gives back besides weights into the folder ``target``."""
    copy_files(kept_files(source), source, target)


def remove_tokenizer(folder: Path) -> None:
    """Remove the tokenizer's files and chat templates."""
    for file in tokenizer_files(folder):
        file.unlink()
    for templates in folder.glob(TEMPLATES):
        shutil.rmtree(templates)


def same_tokenizer(folder: Path, other: Path) -> bool:
    """Whether the tokenizer files that both folders have are equal, and there are some."""
    both = [name for name in TOKENIZER_FILES if (folder / name).is_file() and (other / name).is_file()]
    return bool(both) and all((folder / name).read_bytes() == (other / name).read_bytes() for name in both)

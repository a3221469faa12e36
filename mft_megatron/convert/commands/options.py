"""Options and notes that several conversion commands have in common.

Like :func:`option`, the functions named ``…_option`` return a dataclass field; their annotation is that of the field.
"""

from collections.abc import Iterable

from mft_megatron.errors import InputError
from mft_megatron.options import option
from mft_megatron.run_folder.verification import AUTO, LEVELS

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def load_option() -> str:
    """Declare ``--load``, the checkpoint to convert."""
    return option(
        None, "Run folder (its newest checkpoint is taken) or one iter_NNNNNNN folder.", metavar="CKPT", required=True
    )


def verify_option() -> str:
    """Declare ``--verify-checkpoint`` for a command that reads a checkpoint."""
    return option(
        AUTO,
        "Compare the checkpoint's files with their sizes and hashes first: full reads all, auto up to 16 GiB and "
        "above that so many pieces at random, sizes none. A damaged checkpoint is refused.",
        choices=LEVELS,
    )


def best_option() -> bool:
    """Declare ``--best`` for a command with :func:`load_option`."""
    return option(False, "Take the best checkpoint of the run folder instead of the newest.")


def best_of_load_option() -> bool:
    """Declare ``--best`` where ``--load`` may be left out."""
    return option(False, "With --load: the best checkpoint of the run folder instead of the newest.")


def save_option() -> str:
    """Declare ``--save``, the run folder to write."""
    return option(None, "Folder to write, to be given as --load; must not exist.", metavar="CKPT", required=True)


def new_folder_option() -> str:
    """Declare ``--hf`` or ``--out``, the folder to write."""
    return option(None, "Folder to write; must not exist.", metavar="DIR", required=True)


def exported_folder_option() -> str:
    """Declare ``--hf``, a Hugging Face folder that an export wrote."""
    return option(None, "Folder of the model, as mcore-to-hf wrote it.", metavar="DIR", required=True)


def tokenizer_option() -> str | None:
    """Declare ``--tokenizer-model``, the tokenizer of an export."""
    return option(
        None,
        "Folder of tokenizer files to copy; the chat template is what was trained. Not given: tokenizer/ of the run.",
        metavar="DIR",
    )


def shard_size_option() -> str:
    """Declare ``--max-shard-size``; :func:`parse_size` reads its value."""
    return option("5GB", "Begin a new safetensors file at this size.")


def print_notes(notes: Iterable[str]) -> None:
    """Print notes for the user."""
    for note in notes:
        print(f"note: {note}")


def parse_size(text: str) -> int:
    """Convert a size such as ``5GB``, ``200MB`` or ``64KB`` to bytes.

    Raises:
        InputError: the text is no such size.
    """
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in UNITS or not number.isdecimal() or int(number) == 0:
        raise InputError(f"--max-shard-size {text!r}: give a number with KB, MB or GB, e.g. 5GB")
    return int(number) * UNITS[unit]

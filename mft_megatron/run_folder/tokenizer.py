"""The tokenizer's files in a run folder."""

import shutil
from pathlib import Path

from mft_megatron.parsing.links import refuse_odd_link

# The files of a Hugging Face tokenizer; their folder may also hold a model.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_tokenizer(model: Path, target: Path) -> bool:
    """Copy the files of a tokenizer, and nothing else, into the folder ``target``.

    Args:
        model: the tokenizer's folder, or a file in it. A SentencePiece model gets the name that transformers expects.
        target: created if needed.

    Returns:
        whether there were any files.

    Raises:
        InputError: one of them is a link to a file elsewhere.
    """
    folder = model if model.is_dir() else model.parent
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if model.is_file() and model.suffix == ".model":
        found["tokenizer.model"] = model
    if not model.exists() or not found:
        return False
    target.mkdir(parents=True, exist_ok=True)
    for name, file in found.items():
        refuse_odd_link(file)
        shutil.copyfile(file, target / name)
    return True

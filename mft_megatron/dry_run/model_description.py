"""The description of a model in a Hugging Face folder, from its ``config.json`` alone: no weight need be there."""

from collections.abc import Sequence
from pathlib import Path

from mft_megatron.convert.huggingface.converted_checkpoint import describe
from mft_megatron.convert.huggingface.model_folder import CONFIG, read_architecture, read_config, unread_entries
from mft_megatron.errors import InputError
from mft_megatron.mcore.platform.precisions import PRECISIONS
from mft_megatron.run_folder.description import CheckpointInfo


def model_folder(path: str) -> str:
    """The folder of a model that is given by it or by the ``config.json`` in it.

    Raises:
        InputError: there is no such file, or it has another name.
    """
    file = Path(path)
    if file.name == CONFIG and not file.exists():
        raise InputError(f"--hf-checkpoint {path}: no such file")
    if not file.is_file():
        return path
    if file.name != CONFIG:
        raise InputError(f"--hf-checkpoint {path}: name the file {CONFIG}, or give the folder of a model")
    return str(file.parent)


def describe_model(folder: Path) -> tuple[CheckpointInfo, Sequence[str]]:
    """Describe the model in a folder as a start from it would, without its weights.

    Returns:
        info: as :class:`~mft_megatron.convert.huggingface.weight_source.HuggingFaceSource` has it; the precision is
            the one that ``config.json`` names, bf16 where it names none.
        notes: lines for the user about entries that are not read.

    Raises:
        InputError: the model is not supported.
    """
    family, architecture, vocab_size = read_architecture(folder)
    config = read_config(folder)
    named = config.get("dtype", config.get("torch_dtype"))
    dtype = next((p.dtype for p in PRECISIONS if p.huggingface == named), PRECISIONS[1].dtype)
    note = unread_entries(folder)
    return describe(family.architecture, architecture, vocab_size, dtype), [note] if note else []

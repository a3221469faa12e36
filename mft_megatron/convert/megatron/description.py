"""The checkpoint that the user means, and the architecture that it describes."""

from collections.abc import Mapping
from pathlib import Path

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.common_state import COMMON, INDEX, OBJECT, read_args, read_common
from mft_megatron.errors import InputError
from mft_megatron.run_folder.names import INFO, TRACKER, iteration_folder

from .arguments import network_of, read_megatron_lm
from .run_config import RUN_CONFIG, megatron_lm_args, read_model_section


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """Find the ``torch_dist`` checkpoint in ``folder``: of ``step``, the newest by the tracker file, or ``folder``.

    Raises:
        InputError: there is none, or it has another format or was written by this program.
    """
    path = folder
    if not (folder / INDEX).is_file():
        if step is not None:
            path = iteration_folder(folder, step)
        elif (folder / TRACKER).is_file():
            text = (folder / TRACKER).read_text().strip()
            path = iteration_folder(folder, int(text)) if text.isdecimal() else folder / "release"
        elif iterations := sorted(folder.glob("iter_*")):
            path = iterations[-1]
    if (path / INFO).is_file():
        raise InputError(f"--load {path}: is a checkpoint of this program; pretrain_mft.py takes it with --load")
    if not (path / INDEX).is_file():
        raise InputError(
            f"--load {path}: no {INDEX} there, so it is no torch_dist checkpoint; Megatron-LM converts one of another "
            "format with --ckpt-convert-format torch_dist"
        )
    return path


def read_description(path: Path) -> tuple[NetworkArguments, int | None]:
    """Read the architecture that a checkpoint describes, and the size of the vocabulary if that is stored, too.

    Raises:
        InputError: it has no description, or one that this program cannot express.
    """
    args, file = read_args(read_common(path)), path / RUN_CONFIG
    try:
        if args is not None:
            return read_megatron_lm(args), _vocab_size(args)
        if file.is_file():
            model = read_model_section(file)
            size = model.get("vocab_size")
            return network_of(megatron_lm_args(model)), size if isinstance(size, int) else None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path}: its description of the model is damaged ({error})") from None
    raise InputError(
        f"{path}: neither args in its common state ({COMMON}, or {OBJECT} in its {INDEX}) nor {RUN_CONFIG}, so nothing "
        "says what model this is"
    )


def _vocab_size(args: Mapping[str, object]) -> int | None:
    """``--vocab-size`` of Megatron-LM, which a run with a tokenizer need not give."""
    size = args.get("vocab_size")
    if not isinstance(size, int):
        return None
    return size + 1 if args.get("tokenizer_type") == "NullTokenizer" else size  # it adds an end of document

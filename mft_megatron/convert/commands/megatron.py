"""``megatron-to-mcore`` of ``tools/convert_checkpoint.py``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mft_megatron.options import option, read_options

from .options import print_notes, save_option


@dataclasses.dataclass(frozen=True)
class MegatronOptions:
    """Convert the weights of a torch_dist checkpoint of Megatron-LM or Megatron-Bridge to a checkpoint for --load."""

    load: str = option(
        None,
        "Folder with latest_checkpointed_iteration.txt, or one iter_NNNNNNN or release folder.",
        metavar="DIR",
        required=True,
    )
    save: str = save_option()
    ckpt_step: int | None = option(None, "Take this iteration instead of the newest.", at_least=0)
    vocab_size: int | None = option(
        None, "Tokens of the tokenizer; rows beyond them are padding and are left out.", at_least=1
    )
    hf: str | None = option(
        None,
        "Hugging Face folder of the same architecture: an export gets its configuration and tokenizer, and its "
        "vocab_size is taken.",
        metavar="DIR",
    )


def megatron_to_mcore(command_line: Sequence[str]) -> None:
    """Convert a checkpoint that another program on Megatron-Core wrote.

    Raises:
        InputError: there is no such checkpoint, this program cannot express it, or the target exists.
    """
    options = read_options(MegatronOptions, command_line, "convert_checkpoint.py megatron-to-mcore")
    from mft_megatron.convert.huggingface.model_folder import unread_entries
    from mft_megatron.convert.megatron.model_import import import_megatron

    hf = Path(options.hf) if options.hf else None
    path, info = import_megatron(Path(options.load), Path(options.save), options.vocab_size, hf, options.ckpt_step)
    layers = info.architecture["num_layers"]
    print(f"{path} -> {options.save}: {layers} layers, {info.precision}, vocabulary of {info.vocab_size:,}")
    note = None if hf is None else unread_entries(hf)
    print_notes([] if note is None else [note])

"""``lora-to-peft`` and ``adapters`` of ``tools/convert_checkpoint.py``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mft_megatron.errors import InputError
from mft_megatron.options import option, read_options
from mft_megatron.run_folder.found import select_checkpoint
from mft_megatron.run_folder.verification import require_whole

from .options import best_option, load_option, new_folder_option, tokenizer_option, verify_option


@dataclasses.dataclass(frozen=True)
class PeftOptions:
    """Export the adapters of a checkpoint as a PEFT folder. The parallel layout that wrote it does not matter. Runs on
    one process."""

    load: str = load_option()
    best: bool = best_option()
    verify_checkpoint: str = verify_option()
    hf: str = new_folder_option()
    base_model_name: str | None = option(
        None,
        "Name of the base model in adapter_config.json. Not given: the folder that it was read from.",
        metavar="NAME",
    )
    tokenizer_model: str | None = tokenizer_option()


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """List the adapters in and below folders: checkpoints of this program that have some, and PEFT folders."""

    folder: tuple[str, ...] | None = option(
        None, "Folders to search. The option's name may be left out.", metavar="DIR"
    )


def lora_to_peft(command_line: Sequence[str]) -> None:
    """Export the adapters of a checkpoint.

    Raises:
        InputError: there is no such checkpoint, it has no adapters, or the target exists.
    """
    options = read_options(PeftOptions, command_line, "convert_checkpoint.py lora-to-peft")
    selected = select_checkpoint(options.load, options.best)
    print(require_whole(selected, options.verify_checkpoint), flush=True)
    tokenizer = Path(options.tokenizer_model) if options.tokenizer_model else None
    from mft_megatron.convert.peft.adapter_export import export_adapter

    lora, lines = export_adapter(selected, Path(options.hf), tokenizer, options.base_model_name)
    for line in lines:
        print(line)
    print(f"{selected.path} -> {options.hf}: {lora.describe()}, iteration {selected.info.iteration}")


def list_adapters(command_line: Sequence[str]) -> None:
    """Print a table of adapters.

    Raises:
        InputError: no folder is given, one does not exist, or there is no adapter.
    """
    words = list(command_line)
    if words and not words[0].startswith("-"):
        words.insert(0, "--folder")
    options = read_options(ListOptions, words, "convert_checkpoint.py adapters")
    if not options.folder:
        raise InputError("give the folders to search: adapters DIR …")
    from mft_megatron.convert.peft.listing import find_adapters, table

    adapters, notes = find_adapters(map(Path, options.folder))
    for note in notes:
        print(f"not read: {note}")
    if not adapters:
        raise InputError(
            f"{', '.join(options.folder)}: no adapters in or below; give folders of runs with --peft-type, or of PEFT"
        )
    print(table(adapters))

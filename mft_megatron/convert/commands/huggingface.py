"""``hf-to-mcore`` and ``mcore-to-hf`` of ``tools/convert_checkpoint.py``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mft_megatron.options import option, read_options
from mft_megatron.run_folder.found import refuse_adapters, select_checkpoint
from mft_megatron.run_folder.verification import require_whole

from .options import (
    best_option,
    load_option,
    new_folder_option,
    parse_size,
    print_notes,
    save_option,
    shard_size_option,
    tokenizer_option,
    verify_option,
)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Export a checkpoint as a Hugging Face folder. The parallel layout that wrote it does not matter. Runs on one
    process."""

    load: str = load_option()
    best: bool = best_option()
    verify_checkpoint: str = verify_option()
    hf: str = new_folder_option()
    tokenizer_model: str | None = tokenizer_option()
    max_shard_size: str = shard_size_option()


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """Convert a Hugging Face folder to a checkpoint that any parallel layout loads with --load. Runs on one process."""

    hf: str = option(None, "Folder of the model: config.json and safetensors files.", metavar="DIR", required=True)
    save: str = save_option()


def hf_to_mcore(command_line: Sequence[str]) -> None:
    """Convert a Hugging Face folder to a checkpoint.

    Raises:
        InputError: the model is not supported, its folder is incomplete, or the target exists.
    """
    options = read_options(ImportOptions, command_line, "convert_checkpoint.py hf-to-mcore")
    from mft_megatron.convert.huggingface.model_import import import_model

    model = import_model(Path(options.hf), Path(options.save))
    info = model.info
    print(f"{options.hf} -> {options.save}: {model.family.name}, {info.precision}, vocabulary of {info.vocab_size:,}")
    print_notes(model.notes)


def mcore_to_hf(command_line: Sequence[str]) -> None:
    """Export the model of a checkpoint.

    Raises:
        InputError: there is no such checkpoint, it has adapters, no family can express it, or the target exists.
    """
    options = read_options(ExportOptions, command_line, "convert_checkpoint.py mcore-to-hf")
    selected = select_checkpoint(options.load, options.best)
    refuse_adapters(selected)
    print(require_whole(selected, options.verify_checkpoint), flush=True)
    shard_bytes = parse_size(options.max_shard_size)
    # importing torch takes seconds: refusals that need no torch come first
    from mft_megatron.convert.huggingface.model_export import export

    tokenizer = Path(options.tokenizer_model) if options.tokenizer_model else None
    family, lines = export(selected, Path(options.hf), tokenizer, shard_bytes)
    for line in lines:
        print(line)
    print(f"{selected.path} -> {options.hf}: {family.name}, iteration {selected.info.iteration}")

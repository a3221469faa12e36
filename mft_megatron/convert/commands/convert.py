"""The command line of ``tools/convert_checkpoint.py``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mft_megatron.errors import InputError
from mft_megatron.options import option, read_options
from mft_megatron.run_folder import select_checkpoint

from .adapters import list_adapters, lora_to_peft, merge_lora, refuse_adapters
from .check import check
from .megatron import megatron_to_mcore


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """A checkpoint becomes a Hugging Face folder; the layout that wrote it does not matter. Runs on one process."""

    load: str = option(
        None, "Run folder (its newest checkpoint is taken) or one iter_NNNNNNN folder.", metavar="CKPT", required=True
    )
    best: bool = option(False, "Take the best checkpoint of the run folder instead of the newest.")
    hf: str = option(None, "Folder to write; must not exist.", metavar="DIR", required=True)
    tokenizer_model: str | None = option(
        None, "Folder of tokenizer files to copy. Not given: tokenizer/ of the run folder.", metavar="DIR"
    )
    max_shard_size: str = option("5GB", "Begin a new safetensors file at this size.")


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """A Hugging Face folder becomes a checkpoint that any layout loads with --load. Runs on one process."""

    hf: str = option(None, "Folder of the model: config.json and safetensors files.", metavar="DIR", required=True)
    save: str = option(None, "Folder to write, to be given as --load; must not exist.", metavar="CKPT", required=True)


def hf_to_mcore(command_line: Sequence[str]) -> None:
    """Convert a model into a checkpoint."""
    options = read_options(ImportOptions, command_line, "convert_checkpoint.py hf-to-mcore")
    from mft_megatron.convert.huggingface.model_import import import_model

    family, info = import_model(Path(options.hf), Path(options.save))
    print(f"{options.hf} -> {options.save}: {family.name}, {info.precision}, vocabulary of {info.vocab_size:,}")


def mcore_to_hf(command_line: Sequence[str]) -> None:
    """Export the model of a checkpoint."""
    options = read_options(ExportOptions, command_line, "convert_checkpoint.py mcore-to-hf")
    checkpoint = select_checkpoint(options.load, options.best)
    path, info = checkpoint.path, checkpoint.info
    refuse_adapters(path, info)
    # torch only now: what can be refused without it has been
    from mft_megatron.convert.huggingface.model_export import export, parse_size

    shard_bytes = parse_size(options.max_shard_size)
    tokenizer = Path(options.tokenizer_model) if options.tokenizer_model else None
    family = export(path, info, Path(options.hf), tokenizer, shard_bytes)
    print(f"{path} -> {options.hf}: {family.name}, iteration {info.iteration}")


DIRECTIONS = {
    "hf-to-mcore": hf_to_mcore,
    "mcore-to-hf": mcore_to_hf,
    "check": check,
    "megatron-to-mcore": megatron_to_mcore,
    "lora-to-peft": lora_to_peft,
    "merge-lora": merge_lora,
    "adapters": list_adapters,
}


def main(command_line: Sequence[str]) -> None:
    """Run the direction that the first word names."""
    word = command_line[0] if command_line else "--help"
    if word in ("-h", "--help"):
        print(
            f"usage: convert_checkpoint.py {{{','.join(DIRECTIONS)}}} [options]\n\nEach direction has its own --help."
        )
        return
    if word not in DIRECTIONS:
        raise InputError(f"unknown direction {word!r}; give one of: {', '.join(DIRECTIONS)}")
    DIRECTIONS[word](command_line[1:])

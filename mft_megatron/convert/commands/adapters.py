"""The directions of ``tools/convert_checkpoint.py`` that are about adapters."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mft_megatron.errors import InputError
from mft_megatron.options import option, read_options
from mft_megatron.run_folder import (
    CheckpointInfo,
    CheckpointRef,
    content_digest,
    is_checkpoint,
    latest_checkpoint,
    select_checkpoint,
)

if TYPE_CHECKING:
    from mft_megatron.convert.peft.adapter_reader import AdapterReader
    from mft_megatron.convert.peft.merge import Base
    from mft_megatron.convert.peft.weight_source import AdapterSource


@dataclasses.dataclass(frozen=True)
class PeftOptions:
    """The adapters of a checkpoint become a PEFT folder, whatever layout wrote it. Runs on one process."""

    load: str = option(
        None, "Run folder (its newest checkpoint is taken) or one iter_NNNNNNN folder.", metavar="CKPT", required=True
    )
    best: bool = option(False, "Take the best checkpoint of the run folder instead of the newest.")
    hf: str = option(None, "Folder to write; must not exist.", metavar="DIR", required=True)
    base_model_name: str | None = option(
        None,
        "What adapter_config.json calls the model beside the adapters. Not given: the folder that it was read from.",
        metavar="NAME",
    )
    tokenizer_model: str | None = option(
        None, "Folder of tokenizer files to copy. Not given: tokenizer/ of the run folder.", metavar="DIR"
    )


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """Adapters are merged into their model, which becomes a Hugging Face folder. Runs on one process.

    They are those of a checkpoint (--load), or PEFT folders (--adapter). W + scale · B A is computed in fp64 and
    rounded to the dtype of the model.
    """

    load: str | None = option(
        None,
        "Checkpoint with adapters: run folder (its newest checkpoint is taken) or one iter_NNNNNNN folder.",
        metavar="CKPT",
    )
    best: bool = option(False, "With --load: the best checkpoint of the run folder instead of the newest.")
    adapter: tuple[str, ...] | None = option(
        None,
        "PEFT folders to merge instead of --load's adapters; of several the sum. Needs --base.",
        repeated=True,
        metavar="DIR",
    )
    base: str | None = option(
        None,
        "The model, as a Hugging Face folder or a checkpoint. Not given: that in the checkpoint of --load or, where it "
        "holds adapters alone, the folder that the run read it from.",
        metavar="DIR",
    )
    hf: str = option(None, "Folder to write; must not exist.", metavar="DIR", required=True)
    tokenizer_model: str | None = option(
        None,
        "Folder of tokenizer files to copy. Not given: tokenizer/ of the run folder, those in the first PEFT folder "
        "that has some, or else those of the model.",
        metavar="DIR",
    )
    max_shard_size: str = option("5GB", "Begin a new safetensors file at this size.")


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """Lists the adapters in and below folders: checkpoints of this program that have some, and PEFT folders."""

    folder: tuple[str, ...] | None = option(None, "Where to look. The option's name may be left out.", metavar="DIR")


def lora_to_peft(command_line: Sequence[str]) -> None:
    """Export the adapters of a checkpoint."""
    options = read_options(PeftOptions, command_line, "convert_checkpoint.py lora-to-peft")
    checkpoint = select_checkpoint(options.load, options.best)
    path, info = checkpoint.path, checkpoint.info
    tokenizer = Path(options.tokenizer_model) if options.tokenizer_model else None
    from mft_megatron.convert.peft.adapter_export import export_adapter

    lora = export_adapter(path, info, Path(options.hf), tokenizer, options.base_model_name)
    print(f"{path} -> {options.hf}: {lora.describe()}, iteration {info.iteration}")


def merge_lora(command_line: Sequence[str]) -> None:
    """Export a model with adapters merged into it."""
    options = read_options(MergeOptions, command_line, "convert_checkpoint.py merge-lora")
    if (options.load is None) == (not options.adapter):
        raise InputError("give --load CKPT or --adapter DIR …, one of the two; see --help")
    if options.adapter and (options.base is None or options.best):
        raise InputError(
            "--adapter: --best is of --load; leave it out" if options.best else "--adapter: give --base, the model"
        )
    from mft_megatron.convert.huggingface.model_export import parse_size
    from mft_megatron.convert.peft.merge import merge

    shard_bytes = parse_size(options.max_shard_size)
    given = (_from_checkpoint if options.load else _from_peft)(options)
    merge(given.base, list(given.adapters.values()), Path(options.hf), shard_bytes, given.trained, given.tokenizer)
    for name, adapter in given.adapters.items():
        print(f"{name}: {adapter.lora.describe()}")
    several = name if len(given.adapters) == 1 else f"{len(given.adapters)} adapters"
    print(f"{given.base.path} with {several} -> {options.hf}: {given.base.family.name}")


@dataclasses.dataclass(frozen=True)
class _Given:
    """What is merged. ``adapters``: by where they are; ``trained``: the checkpoint that they are from, if any."""

    base: "Base"
    adapters: dict[str, "AdapterReader | AdapterSource"]
    trained: CheckpointRef | None
    tokenizer: Path | None


def _from_checkpoint(options: MergeOptions) -> _Given:
    """By ``--load``."""
    from mft_megatron.convert.peft.adapter_reader import AdapterReader
    from mft_megatron.convert.peft.merge import CheckpointBase, open_base, refuse_other_model

    checkpoint = select_checkpoint(options.load, options.best)
    path, info = checkpoint.path, checkpoint.info
    adapter = AdapterReader(path, info)
    if options.base is None and info.has_base:
        base = CheckpointBase(path, info)
    else:
        folder = _folder_of_base(path, info, options.base)
        base = open_base(folder)
        refuse_other_model(base, info, f"--base {folder}")
    tokenizer = Path(options.tokenizer_model) if options.tokenizer_model else None
    return _Given(base, {str(path): adapter}, checkpoint, tokenizer)


def _folder_of_base(path: Path, info: CheckpointInfo, given: str | None) -> Path:
    """Where the model beside a checkpoint's adapters is; one that is no longer what it was is refused or told of."""
    if given is None and not info.base:
        raise InputError(f"{path}: holds adapters alone and does not say of which model; give --base")
    folder = Path(given or info.base)
    if given is None and not folder.is_dir():
        raise InputError(f"{path}: the model was read from {folder}, which is gone; give --base, where it is now")
    if info.base_digest and folder.is_dir():
        # an exported model may be called iter_NNNNNNN, too
        has_weights = any(folder.glob("*.safetensors"))
        stored = latest_checkpoint(folder, "--base").path if is_checkpoint(folder) and not has_weights else folder
        if content_digest(stored) != info.base_digest:
            if given is None:
                raise InputError(
                    f"{path}: the model that was read from {folder} has changed since; give --base, the one that the "
                    "adapters were trained on"
                )
            print(f"note: --base {folder} holds other files than {info.base}, which the adapters were trained on")
    return folder


def _from_peft(options: MergeOptions) -> _Given:
    """By ``--adapter``."""
    from mft_megatron.convert.peft.merge import open_base
    from mft_megatron.convert.peft.weight_source import AdapterSource
    from mft_megatron.run_folder import TOKENIZER_FILES

    base = open_base(Path(options.base))
    adapters = {folder: AdapterSource(folder, base.info) for folder in options.adapter}
    if len(adapters) < len(options.adapter):
        raise InputError("--adapter: a folder is named twice; name each once")
    own = [folder for folder in options.adapter if any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)]
    tokenizer = options.tokenizer_model or next(iter(own), None)
    return _Given(base, adapters, None, Path(tokenizer) if tokenizer else None)


def list_adapters(command_line: Sequence[str]) -> None:
    """Print a table of adapters."""
    words = list(command_line)
    if words and not words[0].startswith("-"):
        words.insert(0, "--folder")
    options = read_options(ListOptions, words, "convert_checkpoint.py adapters")
    if not options.folder:
        raise InputError("give the folders to look into: adapters DIR …")
    from mft_megatron.convert.peft.listing import find, table

    folders = [Path(folder) for folder in options.folder]
    found, notes = find(folders)
    for note in notes:
        print(f"not read: {note}")
    if not found:
        raise InputError(
            f"{', '.join(options.folder)}: no adapters in or below; give folders of runs with --peft-type, or of PEFT"
        )
    print(table(found))


def refuse_adapters(path: Path, info: CheckpointInfo) -> None:
    """Check that a checkpoint can be exported as it is.

    Raises:
        InputError: it has adapters, which a model's folder has no place for.
    """
    if info.lora is not None:
        raise InputError(
            f"--load {path}: has adapters; merge-lora writes the model with them merged into it, lora-to-peft writes "
            "them alone"
        )

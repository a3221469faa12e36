"""``merge-lora`` of ``tools/convert_checkpoint.py``."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mft_megatron.errors import InputError
from mft_megatron.options import option, read_options
from mft_megatron.run_folder.content import content_digest
from mft_megatron.run_folder.description import CheckpointRef
from mft_megatron.run_folder.found import latest_checkpoint, select_checkpoint
from mft_megatron.run_folder.names import is_checkpoint
from mft_megatron.run_folder.tokenizer import TOKENIZER_FILES
from mft_megatron.run_folder.verification import require_whole

from .options import best_of_load_option, new_folder_option, parse_size, print_notes, shard_size_option, verify_option

if TYPE_CHECKING:
    from mft_megatron.convert.huggingface.stored_model import StoredModel
    from mft_megatron.convert.peft.merge import Adapter


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """Merge adapters into their model and write a Hugging Face folder. Runs on one process.

    The adapters are those of a checkpoint (--load), or PEFT folders (--adapter). W + scale · B A is computed in fp64
    and rounded to the dtype of the model.
    """

    load: str | None = option(
        None,
        "Checkpoint with adapters: run folder (its newest checkpoint is taken) or one iter_NNNNNNN folder.",
        metavar="CKPT",
    )
    best: bool = best_of_load_option()
    verify_checkpoint: str = verify_option()
    adapter: tuple[str, ...] | None = option(
        None,
        "PEFT folders to merge instead of --load's adapters; several are added. Needs --base.",
        repeated=True,
        metavar="DIR",
    )
    base: str | None = option(
        None,
        "The model, as a Hugging Face folder or a checkpoint. Not given: that in the checkpoint of --load or, where it "
        "holds adapters alone, the folder that the run read it from.",
        metavar="DIR",
    )
    hf: str = new_folder_option()
    tokenizer_model: str | None = option(
        None,
        "Folder of tokenizer files to copy. Not given: tokenizer/ of the run folder, those in the first PEFT folder "
        "that has some, or else those of the model.",
        metavar="DIR",
    )
    max_shard_size: str = shard_size_option()


@dataclasses.dataclass(frozen=True)
class _Merge:
    """A model and its adapters.

    Attributes:
        base: the model.
        adapters: the adapters by their folder.
        trained: the checkpoint that holds the adapters; ``None`` for PEFT folders.
        tokenizer: folder of the tokenizer to write; ``None``: that of ``trained`` or of ``base``.
        stops: stop tokens that are in PEFT folders.
    """

    base: "StoredModel"
    adapters: "Mapping[str, Adapter]"
    trained: CheckpointRef | None
    tokenizer: Path | None
    stops: tuple[int, ...] = ()


def merge_lora(command_line: Sequence[str]) -> None:
    """Export a model with adapters merged into it.

    Raises:
        InputError: options contradict each other, model and adapters do not fit, or the target exists.
    """
    options = read_options(MergeOptions, command_line, "convert_checkpoint.py merge-lora")
    shard_bytes = parse_size(options.max_shard_size)
    if options.load is not None and not options.adapter:
        trained = select_checkpoint(options.load, options.best)
        print(require_whole(trained, options.verify_checkpoint), flush=True)
        given = _of_checkpoint(trained, options)
    elif options.load is None and options.adapter:
        given = _of_peft_folders(options.adapter, options)
    else:
        raise InputError("give --load CKPT or --adapter DIR …, one of the two; see --help")
    from mft_megatron.convert.peft.merge import merge

    adapters = given.adapters
    target = Path(options.hf)
    lines = merge(given.base, list(adapters.values()), target, shard_bytes, given.trained, given.tokenizer, given.stops)
    for line in lines:
        print(line)
    for folder, adapter in adapters.items():
        print(f"{folder}: {adapter.lora.describe()}")
    merged = next(iter(adapters)) if len(adapters) == 1 else f"{len(adapters)} adapters"
    print(f"{given.base.path} with {merged} -> {options.hf}: {given.base.family.name}")
    print_notes(given.base.notes)


def _of_checkpoint(trained: CheckpointRef, options: MergeOptions) -> _Merge:
    """The merge of a checkpoint's adapters into the model in it, the model that it names, or ``--base``."""
    from mft_megatron.convert.huggingface.stored_model import CheckpointModel, StoredModel
    from mft_megatron.convert.peft.adapter_reader import AdapterReader
    from mft_megatron.convert.peft.merge import open_base, refuse_other_model

    adapter = AdapterReader(trained)
    base: StoredModel
    if options.base is None and trained.info.has_base:
        base = CheckpointModel(trained)
    else:
        folder = _folder_of_base(trained, options.base)
        base = open_base(folder, options.verify_checkpoint)
        refuse_other_model(base, trained.info, f"--base {folder}")
    tokenizer = Path(options.tokenizer_model) if options.tokenizer_model else None
    return _Merge(base, {str(trained.path): adapter}, trained, tokenizer)


def _folder_of_base(trained: CheckpointRef, option_base: str | None) -> Path:
    """Choose the folder of the model: ``--base``, or the one that the run read.

    Raises:
        InputError: ``--base`` is not given, and the run's model is not recorded, gone, or has changed.
    """
    path, info = trained.path, trained.info
    if option_base is None and not info.base:
        raise InputError(f"{path}: holds adapters alone and does not say of which model; give --base")
    folder = Path(option_base or info.base)
    if option_base is None and not folder.is_dir():
        raise InputError(f"{path}: the model was read from {folder}, which is gone; give --base, where it is now")
    if info.base_digest and folder.is_dir():
        # an exported model may be called iter_NNNNNNN, too
        has_weights = any(folder.glob("*.safetensors"))
        stored = latest_checkpoint(folder, "--base").path if is_checkpoint(folder) and not has_weights else folder
        if content_digest(stored) != info.base_digest:
            if option_base is None:
                raise InputError(
                    f"{path}: the model that was read from {folder} has changed since; give --base, the one that the "
                    "adapters were trained on"
                )
            print(f"note: --base {folder} holds other files than {info.base}, which the adapters were trained on")
    return folder


def _of_peft_folders(folders: Sequence[str], options: MergeOptions) -> _Merge:
    """The merge of PEFT folders into ``--base``."""
    if options.best:
        raise InputError("--adapter: --best belongs to --load; leave it out")
    if options.base is None:
        raise InputError("--adapter: give --base, the model")
    from mft_megatron.convert.huggingface.chat_files import stop_tokens_in
    from mft_megatron.convert.peft.merge import open_base
    from mft_megatron.convert.peft.weight_source import AdapterSource

    base = open_base(Path(options.base), options.verify_checkpoint)
    adapters = {folder: AdapterSource(folder, base.info) for folder in folders}
    if len(adapters) < len(folders):
        raise InputError("--adapter: a folder is named twice; name each once")
    with_tokenizer = (folder for folder in folders if any((Path(folder) / name).is_file() for name in TOKENIZER_FILES))
    tokenizer = options.tokenizer_model or next(with_tokenizer, None)
    stops = tuple(stop for folder in folders for stop in stop_tokens_in(Path(folder)))
    return _Merge(base, adapters, None, Path(tokenizer) if tokenizer else None, stops)

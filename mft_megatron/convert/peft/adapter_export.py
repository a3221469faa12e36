"""The adapters of a checkpoint as a folder that ``peft.PeftModel.from_pretrained`` loads, and servers with it."""

import contextlib
import json
import os
from pathlib import Path

from mft_megatron.convert.atomic_folder import refuse_content, replacing
from mft_megatron.convert.huggingface.model_folder import copy_files, same_tokenizer, tokenizer_files
from mft_megatron.convert.huggingface.safetensors_reader import SINGLE
from mft_megatron.convert.huggingface.safetensors_writer import PlannedWeight, ShardWriter
from mft_megatron.errors import InputError
from mft_megatron.lora import Lora
from mft_megatron.run_folder import HUGGINGFACE, INFO, TOKENIZER, TRACKER, CheckpointInfo, copy_tokenizer

from .adapter_reader import AdapterReader
from .config import CONFIG, WEIGHTS, config_of
from .weights import key_of


def export_adapter(
    checkpoint: Path,
    info: CheckpointInfo,
    target: Path,
    tokenizer: Path | None = None,
    base_model_name: str | None = None,
) -> Lora:
    """Write the adapters of a checkpoint into the new folder ``target``, in this process alone.

    Matrices keep their dtype; what several A's of ours serve in one matrix there becomes one A of their ranks together.

    Args:
        checkpoint: an ``iter_NNNNNNN`` folder.
        info: its description.
        target: folder to make; must not exist, or be empty.
        tokenizer: folder of tokenizer files to copy as they are; ``None`` for those kept in the run folder.
        base_model_name: what the model beside the adapters is called there; ``None`` for the folder it came from.

    Returns:
        what the adapters are.

    Raises:
        InputError: the checkpoint has no adapters or is damaged, no family can express the architecture, or ``target``
            has content.
    """
    refuse_content(target, "--hf")
    reader = AdapterReader(checkpoint, info)
    matrices = [matrix for row in reader.rows for matrix in row.matrices.values()]
    config = config_of(reader.lora, matrices, base_model_name or _base_model(info))
    with replacing(target) as partial:
        _write_weights(reader, partial)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        _write_tokenizer(checkpoint.parent, tokenizer, partial)
    return reader.lora


def _base_model(info: CheckpointInfo) -> str | None:
    """The folder of the model, unless it is a checkpoint, which PEFT could not load."""
    is_checkpoint = any((Path(info.base) / name).is_file() for name in (INFO, TRACKER))
    return None if is_checkpoint or not info.base else info.base


def _write_weights(reader: AdapterReader, folder: Path) -> None:
    planned, names = [], []
    for layer, matrix in reader.matrices():
        name, rank = matrix.name.format(layer), len(matrix.parts) * reader.lora.rank
        keys = tuple(key_of(name, letter) for letter in "AB")
        shapes = (rank, matrix.shape[1]), (matrix.shape[0], rank)
        planned += [PlannedWeight(key, reader.dtype, shape) for key, shape in zip(keys, shapes, strict=True)]
        names.append((f"{name}.weight", keys))
    # one file, however large: PEFT looks for no other
    with contextlib.closing(ShardWriter(folder, planned, sum(weight.size for weight in planned))) as writer:
        for weight, keys in names:
            for key, content in zip(keys, reader.factors(weight), strict=True):
                writer.write(key, content)
        writer.finish()
    os.replace(folder / SINGLE, folder / WEIGHTS)


def _write_tokenizer(run: Path, tokenizer: Path | None, folder: Path) -> None:
    """The tokenizer that was asked for, that of the run, or else that of the model that the run started from."""
    own, source = tokenizer or run / TOKENIZER, run / HUGGINGFACE
    if tokenizer is None and source.is_dir() and (not own.exists() or same_tokenizer(own, source)):
        # the source may have more files than the run's copy
        copy_files(tokenizer_files(source), source, folder)
    elif not copy_tokenizer(own, folder) and tokenizer is not None:
        raise InputError(f"--tokenizer-model {tokenizer}: no tokenizer files there; give the tokenizer's folder")

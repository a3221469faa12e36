"""Export of a checkpoint's adapters as a folder that ``peft.PeftModel.from_pretrained``, and servers, load."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mft_megatron.convert.atomic_folder import refuse_content, replacing
from mft_megatron.convert.huggingface.chat_files import (
    chat_template_of,
    stop_tokens_in,
    write_chat_template,
    write_stop_tokens,
)
from mft_megatron.convert.huggingface.model_export import write_tokenizer
from mft_megatron.convert.huggingface.model_folder import GENERATION, copy_files, tokenizer_files
from mft_megatron.convert.huggingface.safetensors_reader import SINGLE
from mft_megatron.convert.huggingface.safetensors_writer import PlannedWeight, write_shards
from mft_megatron.lora import Lora
from mft_megatron.run_folder.description import CheckpointInfo, CheckpointRef
from mft_megatron.run_folder.names import HUGGINGFACE, INFO, TRACKER

from .adapter_reader import AdapterReader
from .config import CONFIG, WEIGHTS, config_of
from .weights import LETTERS, key_of


def export_adapter(
    checkpoint: CheckpointRef, target: Path, tokenizer: Path | None = None, base_model_name: str | None = None
) -> tuple[Lora, list[str]]:
    """Write the adapters of a checkpoint into the new folder ``target``, in this process alone.

    Matrices keep their dtype. If a Hugging Face matrix has several A's in the checkpoint, they are concatenated.

    Args:
        checkpoint: the checkpoint.
        target: folder to create; must not exist, or be empty.
        tokenizer: folder of tokenizer files to copy as they are; ``None``: those kept in the run folder.
        base_model_name: name of the base model in the configuration; ``None``: the folder that it was read from.

    Returns:
        the description of the adapters, and lines that the user should read.

    Raises:
        InputError: the checkpoint has no adapters or is damaged, no family can express the architecture, or ``target``
            has content.
    """
    refuse_content(target, "--hf")
    reader, run = AdapterReader(checkpoint), checkpoint.path.parent
    matrices = [matrix for weight in reader.weights for matrix in weight.matrices.values()]
    config = config_of(reader.lora, matrices, base_model_name or _base_model(checkpoint.info))
    with replacing(target) as partial:
        planned = _planned(reader)
        # PEFT reads a single file, however large
        write_shards(partial, planned, _factors(reader), sum(weight.size for weight in planned))
        os.replace(partial / SINGLE, partial / WEIGHTS)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        of_source = None
        if (source := run / HUGGINGFACE).is_dir():
            copy_files(tokenizer_files(source), source, partial)
            of_source = chat_template_of(partial)
        write_tokenizer(run, tokenizer, partial)
        lines = write_chat_template(checkpoint.info, partial, of_source)
        lines += _write_stop_tokens(checkpoint.info, source, partial, target)
    return reader.lora, lines


def _write_stop_tokens(info: CheckpointInfo, source: Path, folder: Path, target: Path) -> list[str]:
    """Write the stop tokens that were trained beside the adapters, and tell users of the base that lacks some.

    Args:
        info: description of the checkpoint.
        source: the base model's configurations, if it came from Hugging Face.
        folder: the export.
        target: its final path.
    """
    stops = info.tokenizer.get("stop_token_ids") or []
    if not stops:
        return []
    if (source / GENERATION).is_file():
        copy_files([source / GENERATION], source, folder)
    write_stop_tokens(info, folder)
    of_base = stop_tokens_in(source)
    lacking = [stop for stop in stops if stop not in of_base]
    if not lacking or not of_base:
        return []
    return [
        f"note: servers take the stop tokens of the base model, which has {', '.join(map(str, of_base))} and lacks "
        f"{', '.join(map(str, lacking))}, which was trained: copy {GENERATION} of {target} there, or give them with "
        "each request (stop_token_ids)"
    ]


def _base_model(info: CheckpointInfo) -> str | None:
    """The folder of the base model, unless it is a checkpoint, which PEFT could not load."""
    is_checkpoint = any((Path(info.base) / name).is_file() for name in (INFO, TRACKER))
    return None if is_checkpoint or not info.base else info.base


def _planned(reader: AdapterReader) -> list[PlannedWeight]:
    planned = []
    for layer, matrix in reader.matrices():
        rank = len(matrix.parts) * reader.lora.rank
        for letter, shape in zip(LETTERS, ((rank, matrix.shape[1]), (matrix.shape[0], rank)), strict=True):
            planned.append(PlannedWeight(key_of(matrix.name.format(layer), letter), reader.dtype, shape))
    return planned


def _factors(reader: AdapterReader) -> Iterator[tuple[str, Tensor]]:
    """Read every A and B in the order of :func:`_planned`: its key in the file and its content."""
    for layer, matrix in reader.matrices():
        module = matrix.name.format(layer)
        for letter, factor in zip(LETTERS, reader.factors(f"{module}.weight") or (), strict=True):
            yield key_of(module, letter), factor

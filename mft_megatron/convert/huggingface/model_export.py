"""A checkpoint as a Hugging Face folder that ``transformers.AutoModelForCausalLM.from_pretrained`` loads.

Weights stream through memory one at a time into safetensors shards. The folder is written beside its final place and
renamed when it is whole.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.atomic_folder import refuse_content, replacing
from mft_megatron.convert.huggingface.families.table import family_for
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from mft_megatron.mcore.checkpointing.vocabulary import has_shape, without_padding
from mft_megatron.mcore.platform.precisions import BY_DTYPE
from mft_megatron.run_folder import HUGGINGFACE, TOKENIZER, CheckpointInfo, copy_tokenizer

from .family import Family, Row, first_difference, places
from .model_folder import CONFIG, GENERATION, copy_kept_files, read_architecture, remove_tokenizer, same_tokenizer
from .row_layouts import Sizes, sizes_of, split
from .safetensors_writer import PlannedWeight, ShardWriter

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(checkpoint: Path, info: CheckpointInfo, target: Path, tokenizer: Path | None, shard_bytes: int) -> Family:
    """Write the model of a checkpoint into the new folder ``target``, in this process alone.

    A model that came from Hugging Face gets its configuration back byte by byte, and its tokenizer, unless it was
    trained with another one.

    Args:
        checkpoint: an ``iter_NNNNNNN`` folder.
        info: its description.
        target: folder to make; must not exist, or be empty.
        tokenizer: folder of tokenizer files to copy as they are; ``None`` for those kept in the run folder.
        shard_bytes: size at which a new shard is begun.

    Returns:
        the family the model was written as.

    Raises:
        InputError: no family can express the architecture, a weight is missing or left over, or ``target`` has content.
    """
    refuse_content(target, "--hf")
    architecture = NetworkArguments(**info.architecture)
    family = family_of_checkpoint(checkpoint, info)
    reader = TensorReader(checkpoint)
    rows, sizes = family.rows(architecture), sizes_of(architecture, info.vocab_size)
    refuse_mismatch(reader, rows, architecture, sizes, family, checkpoint)
    with replacing(target) as partial:
        dtype = _write_weights(reader, rows, architecture, sizes, partial, shard_bytes)
        write_config(checkpoint, info, family, dtype, partial)
        write_generation_config(info, partial)
        write_tokenizer(checkpoint.parent, tokenizer, partial)
    return family


def refuse_export(architecture: NetworkArguments, from_hugging_face: bool) -> None:
    """Check before a run that its checkpoints can be exported.

    Raises:
        InputError: no family can express the architecture.
    """
    if not from_hugging_face:
        try:
            family_for(architecture)
        except InputError as error:
            raise InputError(f"--save-hf: {error}") from None


def family_of_checkpoint(checkpoint: Path, info: CheckpointInfo) -> Family:
    """What the model of a checkpoint is written as: what it came as, or the first family that can express it.

    Raises:
        InputError: there is none, or the configuration it came with is gone or another one's.
    """
    architecture, source = NetworkArguments(**info.architecture), checkpoint.parent / HUGGINGFACE
    if not info.from_hugging_face:
        return family_for(architecture)
    if not (source / CONFIG).is_file():
        raise InputError(
            f"{checkpoint}: came from Hugging Face, but {source / CONFIG} is gone; put the original's config.json there"
        )
    family, expected, _ = read_architecture(source)
    if difference := first_difference(architecture, expected):
        name, has, says = difference
        raise InputError(
            f"{source / CONFIG}: {name} is {says}, the checkpoint has {has}; it is the configuration of another model"
        )
    return family


def refuse_mismatch(
    reader: TensorReader,
    rows: Sequence[Row],
    architecture: NetworkArguments,
    sizes: Sizes,
    family: Family,
    checkpoint: Path,
) -> None:
    expected, found = {row.ours for row in rows}, set(reader.names())
    for names, what in ((expected - found, "has no"), (found - expected, f"has weights {family.name} has not:")):
        if names:
            raise InputError(f"{checkpoint}: {what} {', '.join(sorted(names))}; it was not written by this program")
    for row in rows:
        shape, wanted = reader.entry(row.ours)[0], (*row.stack(architecture), *row.shape(sizes))
        if not has_shape(row.ours, shape, wanted):
            raise InputError(
                f"{checkpoint}: {row.ours} has the shape {list(shape)}, its description says {list(wanted)}; the "
                "checkpoint is damaged"
            )


def _write_weights(
    reader: TensorReader,
    rows: Sequence[Row],
    architecture: NetworkArguments,
    sizes: Sizes,
    folder: Path,
    shard_bytes: int,
) -> torch.dtype:
    """All weights, in the order of the model; the dtype of the last."""
    everything = in_order(rows, architecture)
    planned = [
        PlannedWeight(name.format(*place), reader.entry(row.ours)[1], shape)
        for row, place in everything
        for name, shape in zip(row.theirs, row.their_shapes(sizes), strict=True)
    ]
    with contextlib.closing(ShardWriter(folder, planned, shard_bytes)) as writer:
        for row, place in everything:
            weight = without_padding(row.ours, reader.read([(row.ours, place)])[0], sizes["vocab"])
            for name, content in zip(row.theirs, split(weight, row.blocks(sizes)), strict=True):
                writer.write(name.format(*place), content)
        writer.finish()
    return reader.entry(rows[-1].ours)[1]


def in_order(rows: Sequence[Row], architecture: NetworkArguments) -> list[tuple[Row, tuple[int, ...]]]:
    """What comes before the layers, each layer, what comes after."""
    inside = [number for number, row in enumerate(rows) if row.in_layers]

    def order(entry: tuple[int, tuple[int, ...]]) -> tuple[int, ...]:
        number, place = entry
        return (0 if number < inside[0] else 2 if number > inside[-1] else 1, *place[:1], number, *place[1:])

    everything = [(number, place) for number, row in enumerate(rows) for place in places(row, architecture)]
    return [(rows[number], place) for number, place in sorted(everything, key=order)]


def write_config(checkpoint: Path, info: CheckpointInfo, family: Family, dtype: torch.dtype, folder: Path) -> None:
    """What the model came with besides weights, or the configuration that follows from its description."""
    if info.from_hugging_face:
        copy_kept_files(checkpoint.parent / HUGGINGFACE, folder)
        return
    config = {**family.write_config(NetworkArguments(**info.architecture)), "vocab_size": info.vocab_size}
    config |= {"torch_dtype": BY_DTYPE[dtype].huggingface, "use_cache": True, **_special_tokens(info)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def write_generation_config(info: CheckpointInfo, folder: Path) -> None:
    """For a model that came with none and was trained here: where it is to stop."""
    if (folder / GENERATION).is_file():
        return
    # a chat model stops where a turn ends, not only where the text does
    stops = {"eos_token_id": info.tokenizer["stop_token_ids"]} if info.tokenizer.get("stop_token_ids") else {}
    if tokens := {**_special_tokens(info), **stops}:
        (folder / GENERATION).write_text(json.dumps(tokens, indent=2) + "\n")


def _special_tokens(info: CheckpointInfo) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: info.tokenizer[name] for name in names if info.tokenizer.get(name) is not None}


def write_tokenizer(run: Path, tokenizer: Path | None, folder: Path) -> None:
    """The tokenizer that was asked for, that of the run, or else that of the source, which is there already."""
    own = tokenizer or run / TOKENIZER
    if tokenizer is None and same_tokenizer(own, folder):
        return  # the source's may have more files, and all are to be given back
    if own.exists():
        remove_tokenizer(folder)
    if not copy_tokenizer(own, folder) and tokenizer is not None:
        raise InputError(f"--tokenizer-model {tokenizer}: no tokenizer files there; give the tokenizer's folder")


def parse_size(text: str) -> int:
    """``5GB``, ``200MB`` or ``64KB`` in bytes.

    Raises:
        InputError: anything else.
    """
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in UNITS or not number.isdecimal() or int(number) == 0:
        raise InputError(f"--max-shard-size {text!r}: give a number with KB, MB or GB, e.g. 5GB")
    return int(number) * UNITS[unit]

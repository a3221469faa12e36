"""Export of a checkpoint as a Hugging Face folder that ``transformers.AutoModelForCausalLM.from_pretrained`` loads.

Weights stream through memory one at a time into safetensors shards. The folder is written beside its final path and
renamed when it is complete.
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

from .family import Family, first_difference
from .mapped_weight import MappedWeight
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
        target: folder to create; must not exist, or be empty.
        tokenizer: folder of tokenizer files to copy; ``None``: those kept in the run folder.
        shard_bytes: size at which a new shard is begun.

    Returns:
        the family that the model was written as.

    Raises:
        InputError: no family can express the architecture, a weight is missing or left over, or ``target`` has content.
    """
    refuse_content(target, "--hf")
    architecture = NetworkArguments(**info.architecture)
    family = family_of_checkpoint(checkpoint, info)
    reader = TensorReader(checkpoint)
    sizes = sizes_of(architecture, info.vocab_size)
    refuse_mismatch(reader, family, architecture, sizes, checkpoint)
    with replacing(target) as partial:
        dtype = _write_weights(reader, family.weights(architecture), architecture, sizes, partial, shard_bytes)
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
    """Choose the family to write the model of a checkpoint as: its original one, or the first that can express it.

    Raises:
        InputError: no family can, or the original configuration is gone or is that of another model.
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
    reader: TensorReader, family: Family, architecture: NetworkArguments, sizes: Sizes, checkpoint: Path
) -> None:
    """Check that a checkpoint holds exactly the weights of its architecture.

    Raises:
        InputError: a weight is missing, left over, or of another shape.
    """
    mapped = family.weights(architecture)
    expected, stored = {weight.name for weight in mapped}, set(reader.names())
    for names, problem in (
        (expected - stored, "has no"),
        (stored - expected, f"has weights {family.name} has not:"),
    ):
        if names:
            raise InputError(f"{checkpoint}: {problem} {', '.join(sorted(names))}; it was not written by this program")
    for weight in mapped:
        shape, wanted = reader.entry(weight.name)[0], (*weight.stack(architecture), *weight.shape(sizes))
        if not has_shape(weight.name, shape, wanted):
            raise InputError(
                f"{checkpoint}: {weight.name} has the shape {list(shape)}, its description says {list(wanted)}; the "
                "checkpoint is damaged"
            )


def _write_weights(
    reader: TensorReader,
    mapped: Sequence[MappedWeight],
    architecture: NetworkArguments,
    sizes: Sizes,
    folder: Path,
    shard_bytes: int,
) -> torch.dtype:
    """Write all weights in the order of the model; return the dtype of the last."""
    ordered = in_order(mapped, architecture)
    planned = [
        PlannedWeight(name, reader.entry(weight.name)[1], shape)
        for weight, index in ordered
        for name, shape in zip(weight.hf_names_at(index), weight.hf_shapes(sizes), strict=True)
    ]
    with contextlib.closing(ShardWriter(folder, planned, shard_bytes)) as writer:
        for weight, index in ordered:
            content = without_padding(weight.name, reader.read(weight.name, index), sizes["vocab"])
            parts = split(content, weight.blocks(sizes))
            for name, hf_weight in zip(weight.hf_names_at(index), parts, strict=True):
                writer.write(name, hf_weight)
        writer.finish()
    return reader.entry(mapped[-1].name)[1]


def in_order(
    mapped: Sequence[MappedWeight], architecture: NetworkArguments
) -> list[tuple[MappedWeight, tuple[int, ...]]]:
    """Every weight with its index in the stack: those before the layers, layer by layer, those after the layers."""
    in_layers = [position for position, weight in enumerate(mapped) if weight.in_layers]

    def order(entry: tuple[int, tuple[int, ...]]) -> tuple[int, ...]:
        position, index = entry
        stage = 0 if position < in_layers[0] else 2 if position > in_layers[-1] else 1
        return (stage, *index[:1], position, *index[1:])

    entries = [(position, index) for position, weight in enumerate(mapped) for index in weight.indices(architecture)]
    return [(mapped[position], index) for position, index in sorted(entries, key=order)]


def write_config(checkpoint: Path, info: CheckpointInfo, family: Family, dtype: torch.dtype, folder: Path) -> None:
    """Write the files that the model came with besides weights, or else a configuration from its description."""
    if info.from_hugging_face:
        copy_kept_files(checkpoint.parent / HUGGINGFACE, folder)
        return
    config = {
        **family.write_config(NetworkArguments(**info.architecture)),
        "vocab_size": info.vocab_size,
        "torch_dtype": BY_DTYPE[dtype].huggingface,
        "use_cache": True,
        **_special_tokens(info),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def write_generation_config(info: CheckpointInfo, folder: Path) -> None:
    """Write the stop tokens of a model that came without a generation configuration and was trained here."""
    if (folder / GENERATION).is_file():
        return
    # a chat model stops at the end of a turn, not only at the end of a text
    stops = {"eos_token_id": info.tokenizer["stop_token_ids"]} if info.tokenizer.get("stop_token_ids") else {}
    if tokens := {**_special_tokens(info), **stops}:
        (folder / GENERATION).write_text(json.dumps(tokens, indent=2) + "\n")


def _special_tokens(info: CheckpointInfo) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: info.tokenizer[name] for name in names if info.tokenizer.get(name) is not None}


def write_tokenizer(run: Path, tokenizer: Path | None, folder: Path) -> None:
    """Write the tokenizer into an export that may have the source model's tokenizer already.

    Args:
        run: run folder, whose tokenizer replaces that of the source.
        tokenizer: folder of tokenizer files that replace both.
        folder: folder of the export.

    Raises:
        InputError: ``tokenizer`` has no tokenizer files.
    """
    origin = tokenizer or run / TOKENIZER
    if tokenizer is None and same_tokenizer(origin, folder):
        return  # the source may have more files than the run's copy, and an export returns all of them
    if origin.exists():
        remove_tokenizer(folder)
    if not copy_tokenizer(origin, folder) and tokenizer is not None:
        raise InputError(f"--tokenizer-model {tokenizer}: no tokenizer files there; give the tokenizer's folder")


def parse_size(text: str) -> int:
    """Convert a size such as ``5GB``, ``200MB`` or ``64KB`` to bytes.

    Raises:
        InputError: the text is no such size.
    """
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in UNITS or not number.isdecimal() or int(number) == 0:
        raise InputError(f"--max-shard-size {text!r}: give a number with KB, MB or GB, e.g. 5GB")
    return int(number) * UNITS[unit]

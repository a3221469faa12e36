"""A checkpoint as a Hugging Face folder that ``transformers.AutoModelForCausalLM.from_pretrained`` loads.

Weights stream through memory one layer at a time into safetensors shards. The folder is written beside its final place
and renamed when it is whole.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from mft_megatron.arguments import NetworkArguments
from mft_megatron.convert.families import Family, Row, all_families
from mft_megatron.errors import InputError
from mft_megatron.mcore.tensor_reader import TensorReader
from mft_megatron.run_folder import TOKENIZER, CheckpointInfo, copy_tokenizer

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(checkpoint: Path, info: CheckpointInfo, target: Path, tokenizer: Path | None, shard_bytes: int) -> Family:
    """Write the model of a checkpoint into the new folder ``target``, in this process alone.

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
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--hf {target}: exists already; remove it or name another folder")
    architecture = NetworkArguments(**info.architecture)
    family = _family(architecture)
    reader = TensorReader(checkpoint)
    _refuse_mismatch(reader, family, architecture, checkpoint)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        dtype = _write_weights(reader, family, architecture, info.vocab_size, partial, shard_bytes)
        _write_config(family, architecture, info, dtype, partial)
        if not copy_tokenizer(tokenizer or checkpoint.parent / TOKENIZER, partial) and tokenizer is not None:
            raise InputError(f"--tokenizer-model {tokenizer}: no tokenizer files there; give the tokenizer's folder")
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return family


def _family(architecture: NetworkArguments) -> Family:
    objections = []
    for family in all_families():
        objection = family.refuses(architecture)
        if objection is None:
            return family
        objections.append(f"{family.name}: {objection}")
    raise InputError(f"no Hugging Face family fits this architecture ({'; '.join(objections)})")


def _rows(family: Family, architecture: NetworkArguments) -> list[Row]:
    return [row for row in family.rows if not (architecture.tie_embeddings and row.ours == family.tied_row)]


def _refuse_mismatch(reader: TensorReader, family: Family, architecture: NetworkArguments, checkpoint: Path) -> None:
    expected, found = {row.ours for row in _rows(family, architecture)}, set(reader.names())
    for names, what in ((expected - found, "has no"), (found - expected, f"has weights {family.name} has not:")):
        if names:
            raise InputError(f"{checkpoint}: {what} {', '.join(sorted(names))}; it was not written by this program")


def _requests(rows: list[Row], num_layers: int) -> Iterator[list[tuple[Row, int | None]]]:
    """What to read together: what comes before the layers, each layer, what comes after."""
    first = next(number for number, row in enumerate(rows) if row.in_layers)
    layer_rows = [row for row in rows if row.in_layers]
    yield [(row, None) for row in rows[:first]]
    for layer in range(num_layers):
        yield [(row, layer) for row in layer_rows]
    yield [(row, None) for row in rows[first + len(layer_rows) :]]


def _write_weights(
    reader: TensorReader,
    family: Family,
    architecture: NetworkArguments,
    vocab_size: int,
    folder: Path,
    shard_bytes: int,
) -> torch.dtype:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = 0

    def write_shard() -> None:
        save_file(pending, folder / _shard_name(len(shards)), metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for request in _requests(_rows(family, architecture), architecture.num_layers):
        weights = reader.read([(row.ours, layer) for row, layer in request])
        for (row, layer), weight in zip(request, weights, strict=True):
            for name, part in zip(row.theirs, row.kind(weight, architecture, vocab_size), strict=True):
                pending[name.format(layer)] = part.contiguous()
                total += part.nbytes
            if sum(part.nbytes for part in pending.values()) >= shard_bytes:
                write_shard()
    if pending:
        write_shard()
    _finish_shards(folder, shards, total)
    return weight.dtype


def _shard_name(number: int, of: int | None = None) -> str:
    if of is None:
        return f"shard-{number}.safetensors"
    return "model.safetensors" if of == 1 else f"model-{number + 1:05d}-of-{of:05d}.safetensors"


def _finish_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give shards the names that say how many there are, and write the index."""
    index = {}
    for number, names in enumerate(shards):
        final = _shard_name(number, len(shards))
        os.replace(folder / _shard_name(number), folder / final)
        index.update(dict.fromkeys(names, final))
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _write_config(
    family: Family, architecture: NetworkArguments, info: CheckpointInfo, dtype: torch.dtype, folder: Path
) -> None:
    tokens = {
        name: info.tokenizer[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if info.tokenizer.get(name) is not None
    }
    config = {**family.config(architecture, info.vocab_size, DTYPES[dtype]), **tokens}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # a chat model stops where a turn ends, not only where the text does
    stops = {"eos_token_id": info.tokenizer["stop_token_ids"]} if info.tokenizer.get("stop_token_ids") else {}
    (folder / "generation_config.json").write_text(json.dumps({**tokens, **stops}, indent=2) + "\n")


def parse_size(text: str) -> int:
    """``5GB``, ``200MB`` or ``64KB`` in bytes.

    Raises:
        InputError: anything else.
    """
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in UNITS or not number.isdecimal() or int(number) == 0:
        raise InputError(f"--max-shard-size {text!r}: give a number with KB, MB or GB, e.g. 5GB")
    return int(number) * UNITS[unit]

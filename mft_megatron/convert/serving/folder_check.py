"""What a server needs of a Hugging Face folder, looked at without loading the model."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mft_megatron.convert.huggingface.model_folder import CONFIG, GENERATION, read_architecture, read_config
from mft_megatron.convert.huggingface.model_import import refuse_mismatch
from mft_megatron.convert.huggingface.row_layouts import sizes_of
from mft_megatron.convert.huggingface.safetensors_files import WeightFiles
from mft_megatron.errors import InputError
from mft_megatron.mcore.platform.precisions import BY_DTYPE

from .logits_check import CHAT


@dataclasses.dataclass(frozen=True)
class Finding:
    """``word``: ok; missing: a server can do without; wrong: it stumbles over that; note: worth knowing."""

    word: str
    what: str
    text: str


def findings(folder: Path, tokenizer: Any, reason: str) -> Iterator[Finding]:
    """Everything that is looked at, each as one finding.

    Args:
        folder: of the model.
        tokenizer: its tokenizer as transformers loads it, or ``None``.
        reason: why there is none.
    """
    try:
        family, architecture, vocab_size = read_architecture(folder)
    except InputError as error:
        yield Finding("wrong", CONFIG, str(error))
        return
    yield Finding("ok", CONFIG, f"{family.architecture}, {architecture.num_layers} layers, vocabulary {vocab_size:,}")
    try:
        with contextlib.closing(WeightFiles(folder)) as files:
            refuse_mismatch(files, family.rows(architecture), architecture, sizes_of(architecture, vocab_size))
    except InputError as error:
        yield Finding("wrong", "weights", str(error))
        return
    names = {stored.file.name for stored in files.weights.values()}
    yield Finding("ok", "weights", f"{len(files.weights):,} in {len(names)} safetensors files, of the shapes expected")
    yield Finding("ok", "vocabulary", f"{vocab_size:,} rows, none is padding of a training layout")
    config = read_config(folder)
    yield _dtype(config, {stored.dtype for stored in files.weights.values()})
    yield from _stop_tokens(folder, config, tokenizer, vocab_size)
    yield from _tokenizer(tokenizer, reason, vocab_size)


def _dtype(config: dict[str, Any], stored: set[torch.dtype]) -> Finding:
    said = config.get("dtype") or config.get("torch_dtype")
    there = " and ".join(sorted(BY_DTYPE[dtype].safetensors for dtype in stored))
    if said is None:
        return Finding("missing", "dtype", f"{CONFIG} names none; the weights are {there}")
    if {BY_DTYPE[dtype].huggingface for dtype in stored} == {said}:
        return Finding("ok", "dtype", f"{said}")
    return Finding("note", "dtype", f"{CONFIG} says {said}, the weights are {there}; give the server its --dtype")


def _stop_tokens(folder: Path, config: dict[str, Any], tokenizer: Any, vocab_size: int) -> Iterator[Finding]:
    stops, file = config.get("eos_token_id"), folder / GENERATION
    if not file.is_file():
        yield Finding("missing", GENERATION, f"servers then stop at the eos_token_id of {CONFIG}")
    else:
        try:
            generation = json.loads(file.read_text())
            stops = generation.get("eos_token_id", stops)
        except (ValueError, AttributeError) as error:
            yield Finding("wrong", GENERATION, f"not a JSON object ({error}); write it again")
            return
        yield Finding("ok", GENERATION, f"{len(generation)} entries")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not stops:
        yield Finding("missing", "stop tokens", "no eos_token_id; answers end at the length limit alone")
        return
    outside = [stop for stop in stops if not isinstance(stop, int) or not 0 <= stop < vocab_size]
    if outside:
        yield Finding(
            "wrong", "stop tokens", f"{outside} not in the vocabulary of {vocab_size:,}; correct eos_token_id"
        )
        return
    text = "" if tokenizer is None else ": " + " ".join(map(str, tokenizer.convert_ids_to_tokens(stops)))
    yield Finding("ok", "stop tokens", f"{', '.join(map(str, stops))}{text}")


def _tokenizer(tokenizer: Any, reason: str, vocab_size: int) -> Iterator[Finding]:
    if tokenizer is None:
        yield Finding("missing", "tokenizer", f"{reason}; random tokens are compared")
        yield Finding("missing", "chat template", "comes with a tokenizer")
        return
    if len(tokenizer) > vocab_size:
        yield Finding("wrong", "tokenizer", f"{len(tokenizer):,} tokens, the model has {vocab_size:,}; it is another's")
    else:
        yield Finding("ok", "tokenizer", f"{len(tokenizer):,} tokens")
    if not getattr(tokenizer, "chat_template", None):
        yield Finding("missing", "chat template", "a server can complete text, not chat")
        return
    try:
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program
        yield Finding("wrong", "chat template", f"cannot be rendered ({' '.join(str(error).split())})")
        return
    yield Finding("ok", "chat template", f"{len(text)} characters of a question")

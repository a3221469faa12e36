"""Checks of everything that a server reads from a Hugging Face folder, without loading the model."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from mft_megatron.convert.huggingface.families.table import note_on_unread
from mft_megatron.convert.huggingface.model_folder import (
    CONFIG,
    GENERATION,
    read_architecture,
    read_config,
)
from mft_megatron.convert.huggingface.safetensors_reader import WeightFiles
from mft_megatron.convert.huggingface.weight_check import refuse_mismatch
from mft_megatron.errors import InputError
from mft_megatron.mcore.platform.precisions import BY_DTYPE
from mft_megatron.parsing.json_files import read_json_object

from .finding import Finding
from .prompts import CHAT, ServedTokenizer, render


def findings(folder: Path, tokenizer: ServedTokenizer | None, reason: str) -> Iterator[Finding]:
    """Check a folder; yield one finding for each check, and stop where the next ones would have no meaning.

    Args:
        folder: folder of the model.
        tokenizer: its tokenizer as transformers loads it, or ``None``.
        reason: why there is no tokenizer.
    """
    try:
        family, architecture, vocab_size = read_architecture(folder)
    except InputError as error:
        yield Finding("wrong", CONFIG, str(error))
        return
    yield Finding("ok", CONFIG, f"{family.architecture}, {architecture.num_layers} layers, vocabulary {vocab_size:,}")
    config = read_config(folder)
    if unread := note_on_unread(config, family):
        yield Finding("note", "entries", f"{unread}; other servers may read it")
    try:
        with contextlib.closing(WeightFiles(folder)) as files:
            refuse_mismatch(files, family, architecture, vocab_size)
    except InputError as error:
        yield Finding("wrong", "weights", str(error))
        return
    names = {stored.file.name for stored in files.weights.values()}
    yield Finding("ok", "weights", f"{len(files.weights):,} in {len(names)} safetensors files, of the shapes expected")
    yield Finding("ok", "vocabulary", f"{vocab_size:,} rows, none is padding of a parallel layout")
    yield _dtype(config, {stored.dtype for stored in files.weights.values()})
    yield from _stop_tokens(folder, config, tokenizer, vocab_size)
    yield from _tokenizer(tokenizer, reason, vocab_size)


def _dtype(config: Mapping[str, object], stored: set[torch.dtype]) -> Finding:
    configured = config.get("dtype") or config.get("torch_dtype")
    names = " and ".join(sorted(BY_DTYPE[dtype].safetensors for dtype in stored))
    if configured is None:
        return Finding("missing", "dtype", f"{CONFIG} names none; the weights are {names}")
    if {BY_DTYPE[dtype].huggingface for dtype in stored} == {configured}:
        return Finding("ok", "dtype", f"{configured}")
    return Finding("note", "dtype", f"{CONFIG} says {configured}, the weights are {names}; give the server its --dtype")


def _stop_tokens(
    folder: Path, config: Mapping[str, object], tokenizer: ServedTokenizer | None, vocab_size: int
) -> Iterator[Finding]:
    eos, file = config.get("eos_token_id"), folder / GENERATION
    if not file.is_file():
        yield Finding("missing", GENERATION, f"servers then stop at the eos_token_id of {CONFIG}")
    else:
        try:
            generation = read_json_object(file, "write it again")
        except InputError as error:
            yield Finding("wrong", GENERATION, str(error))
            return
        eos = generation.get("eos_token_id", eos)
        yield Finding("ok", GENERATION, f"{len(generation)} entries")
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not listed:
        yield Finding("missing", "stop tokens", "no eos_token_id; answers end at the length limit alone")
        return
    stops = [stop for stop in listed if isinstance(stop, int) and 0 <= stop < vocab_size]
    outside = [stop for stop in listed if not isinstance(stop, int) or not 0 <= stop < vocab_size]
    if outside:
        yield Finding(
            "wrong", "stop tokens", f"{outside} not in the vocabulary of {vocab_size:,}; correct eos_token_id"
        )
        return
    text = "" if tokenizer is None else ": " + " ".join(map(str, tokenizer.convert_ids_to_tokens(stops)))
    yield Finding("ok", "stop tokens", f"{', '.join(map(str, stops))}{text}")


def _tokenizer(tokenizer: ServedTokenizer | None, reason: str, vocab_size: int) -> Iterator[Finding]:
    if tokenizer is None:
        yield Finding("missing", "tokenizer", f"{reason}; random tokens are compared")
        yield Finding("missing", "chat template", "comes with a tokenizer")
        return
    if len(tokenizer) > vocab_size:
        yield Finding("wrong", "tokenizer", f"{len(tokenizer):,} tokens, the model has {vocab_size:,}; it is another's")
    else:
        yield Finding("ok", "tokenizer", f"{len(tokenizer):,} tokens")
    if not tokenizer.chat_template:
        yield Finding("missing", "chat template", "a server can complete text, not chat")
        return
    try:
        text = render(tokenizer, CHAT)
    except Exception as error:  # a template is a program, which may raise anything
        yield Finding("wrong", "chat template", f"cannot be rendered ({' '.join(str(error).split())})")
        return
    yield Finding("ok", "chat template", f"{len(text)} characters of a question")

"""Whether transformers and the engine compute the same from a Hugging Face folder.

::

    folder ─► transformers, the oracle ─► logits ──────────────┐
    folder, or a checkpoint ─► Megatron-Core, one process ─────┴─► largest difference, KL divergence, top-1 agreement

One model is in memory at a time. Differences are of every position of every prompt, not of the last alone.
"""

import dataclasses
import gc
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.weight_source import CheckpointSource, WeightSource
from mft_megatron.mcore.platform.precisions import DTYPES
from mft_megatron.run_folder import CheckpointRef

# of code models: some languages, prose in another script, structured text
PROMPTS = {
    "python": "def merge_sort(values: list[int]) -> list[int]:\n    if len(values) < 2:\n        return values\n",
    "c++": "#include <vector>\n\ntemplate <typename T>\nT sum(const std::vector<T>& values) {\n    T total{};\n",
    "sql": "SELECT task, COUNT(*) AS samples\nFROM runs\nWHERE loss < 0.5\nGROUP BY task\nORDER BY",
    "json": '{"name": "check", "version": "1.0", "scripts": {"test": "',
    "chinese": "# 用 Python 写一个函数,判断一个字符串是不是回文\ndef is_palindrome(",
    "shell": "for file in $(git diff --name-only HEAD~1); do\n  if [[ $file == *.py ]]; then",
}
CHAT = [{"role": "user", "content": "Write a function that reverses a linked list, and test it."}]
# where there is no tokenizer: so many texts of so many tokens
RANDOM_TEXTS, RANDOM_TOKENS = 4, 32
ROWS_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between the logits of two models after each of ``tokens`` tokens.

    ``largest``: absolute difference of any logit. ``divergence``: mean KL(theirs ‖ ours) of the next token's
    distribution, in nats. ``agreement``: share of positions where both think the same token most likely.
    """

    tokens: int
    largest: float
    divergence: float
    agreement: float


def compare(theirs_SV: Tensor, ours_SV: Tensor) -> Difference:
    """Compare logits, fp32 [S, V] both, in fp64."""
    largest, divergence, agreeing = [], 0.0, 0
    for theirs, ours in zip(theirs_SV.split(ROWS_AT_ONCE), ours_SV.split(ROWS_AT_ONCE), strict=True):
        p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        largest.append((theirs.double() - ours.double()).abs().max())
        agreeing += (theirs.argmax(-1) == ours.argmax(-1)).sum().item()
    tokens = len(theirs_SV)
    # torch's maximum, unlike Python's, is NaN where anything is
    return Difference(tokens, torch.stack(largest).max().item(), divergence / tokens, agreeing / tokens)


def together(differences: Sequence[Difference]) -> Difference:
    """Of all prompts as one text."""
    tokens = sum(one.tokens for one in differences)
    largest = torch.tensor([one.largest for one in differences], dtype=torch.float64).max().item()
    means = (
        math.fsum(getattr(one, name) * one.tokens for one in differences) / tokens
        for name in ("divergence", "agreement")
    )
    return Difference(tokens, largest, *means)


def read_prompts(file: Path) -> dict[str, str]:
    """One prompt a line, by its number; a line that is a JSON string may hold line breaks.

    Raises:
        InputError: there is none.
    """
    if not file.is_file():
        raise InputError(f"--prompts {file}: does not exist; give a text file with one prompt a line")
    found = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            content = json.loads(line)
        except ValueError:
            content = line
        text = content if isinstance(content, str) else line
        if text.strip():
            found[f"line {number}"] = text
    if not found:
        raise InputError(f"--prompts {file}: is empty; write one prompt a line")
    return found


def encode(tokenizer: Any, prompts: dict[str, str] | None, vocab_size: int, limit: int) -> dict[str, list[int]]:
    """Token ids of the prompts, by name, cut to ``limit`` tokens.

    Args:
        tokenizer: of transformers; ``None``: fixed random tokens take the prompts' place.
        prompts: ``None`` for the built-in ones, to which a chat is added where the tokenizer has a template.

    Raises:
        InputError: a token is not in the vocabulary, or there are no tokens.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        texts = torch.randint(vocab_size, (RANDOM_TEXTS, min(RANDOM_TOKENS, limit)), generator=generator).tolist()
        return {f"random {number}": text for number, text in enumerate(texts, 1)}
    encoded = {name: tokenizer(text)["input_ids"][:limit] for name, text in (prompts or PROMPTS).items()}
    if prompts is None and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        encoded["chat"] = tokenizer(text, add_special_tokens=False)["input_ids"][:limit]
    for name, tokens in encoded.items():
        if not tokens:
            raise InputError(f"prompt {name}: the tokenizer makes no tokens of it; leave it out")
        if max(tokens) >= vocab_size:
            raise InputError(
                f"prompt {name}: the tokenizer gives token {max(tokens)}, the vocabulary has {vocab_size}; it is the "
                "tokenizer of another model"
            )
    return encoded


def transformers_logits(folder: Path, dtype: str, texts: Iterable[Sequence[int]]) -> list[Tensor]:
    """Logits of a folder by transformers: fp32 [S, V] of each text, on the CPU.

    Raises:
        InputError: transformers cannot load the folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from mft_megatron.mcore.platform import devices

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation="eager")
    except Exception as error:  # whatever stands in its files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--hf {folder}: transformers cannot load it ({reason}); mend the folder") from None
    model = model.eval().to(devices.device())
    with torch.no_grad():
        found = [model(torch.tensor([text], device=devices.device())).logits[0].float().cpu() for text in texts]
    del model
    gc.collect()
    return found


def engine_logits(
    folder: Path, checkpoint: CheckpointRef | None, dtype: str, texts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Logits by Megatron-Core of the folder, read as ``--hf-checkpoint`` reads it, or of a checkpoint.

    Raises:
        InputError: the model is not supported, or its files are damaged.
    """
    source, arguments, vocab_size = _source(folder, checkpoint, dtype, max(map(len, texts)))
    from mft_megatron.mcore.inference import logits_of, model_of

    with model_of(arguments, vocab_size, source) as model:
        return [logits_of(model, text) for text in texts]


def _source(
    folder: Path, checkpoint: CheckpointRef | None, dtype: str, length: int
) -> tuple[WeightSource, Arguments, int]:
    words = (
        f"--data-path none --seq-length {length} --micro-batch-size 1 --train-iters 1 --lr 1 --attention-dropout 0 "
        f"--hidden-dropout 0 --make-vocab-size-divisible-by 1 {'' if dtype == 'fp32' else f'--{dtype}'}"
    ).split()
    if checkpoint is None:
        source = HuggingFaceSource(str(folder))
        words += ["--hf-checkpoint", str(folder)]
        return source, parse_arguments(words, describe_hf=lambda _: source.info), source.info.vocab_size
    arguments = parse_arguments([*words, "--finetune", "--load", str(checkpoint.path)])
    return CheckpointSource(checkpoint.path, checkpoint.info), arguments, checkpoint.info.vocab_size

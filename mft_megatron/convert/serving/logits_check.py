"""Comparison of the logits that transformers and Megatron-Core compute from a Hugging Face folder.

::

    folder ─► transformers, the reference ─► logits ───────────┐
    folder, or a checkpoint ─► Megatron-Core, one process ─────┴─► largest difference, KL divergence, top-1 agreement

One model is in memory at a time. Every position of every prompt is compared, not only the last.
"""

import dataclasses
import gc
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mft_megatron.errors import InputError
from mft_megatron.mcore.platform.precisions import DTYPES
from mft_megatron.run_folder.description import CheckpointRef

from .one_process import open_model

# positions compared at a time: fp64 copies of whole logits would be large
ROWS_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Difference:
    """Differences between the logits of two models at some positions.

    Attributes:
        tokens: number of positions.
        largest: largest absolute difference of a logit; NaN where a logit is.
        divergence: mean KL(reference ‖ engine) of the next token's distribution, in nats.
        agreement: fraction of positions where both models' most likely token is the same.
    """

    tokens: int
    largest: float
    divergence: float
    agreement: float


def compare(reference_SV: Tensor, engine_SV: Tensor) -> Difference:
    """Compare the logits of two models for one text.

    Args:
        reference_SV: fp32 [S, V], of transformers.
        engine_SV: fp32 [S, V], of Megatron-Core. Both are compared in fp64.
    """
    largest, divergence, agreeing = [], 0.0, 0
    for reference, engine in zip(reference_SV.split(ROWS_AT_ONCE), engine_SV.split(ROWS_AT_ONCE), strict=True):
        p, q = reference.double().log_softmax(-1), engine.double().log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        largest.append((reference.double() - engine.double()).abs().max())
        agreeing += int((reference.argmax(-1) == engine.argmax(-1)).sum())
    tokens = len(reference_SV)
    # torch's maximum, unlike Python's, is NaN where anything is
    return Difference(tokens, torch.stack(largest).max().item(), divergence / tokens, agreeing / tokens)


def combine(differences: Sequence[Difference]) -> Difference:
    """Combine the differences of several texts as if they were one text."""
    tokens = sum(one.tokens for one in differences)
    largest = torch.tensor([one.largest for one in differences], dtype=torch.float64).max().item()
    means = (
        math.fsum(getattr(one, name) * one.tokens for one in differences) / tokens
        for name in ("divergence", "agreement")
    )
    return Difference(tokens, largest, *means)


def transformers_logits(folder: Path, dtype: str, texts: Iterable[Sequence[int]]) -> list[Tensor]:
    """Compute the logits of a folder with transformers.

    Args:
        dtype: precision of the model: fp32, bf16 or fp16.
        texts: token ids.

    Returns:
        logits of each text, fp32 [S, V] on the CPU.

    Raises:
        InputError: transformers cannot load the folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from mft_megatron.mcore.platform import devices

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            attn_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:  # damaged files fail in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--hf {folder}: transformers cannot load it ({reason}); mend the folder") from None
    model = model.eval().to(devices.device())
    with torch.no_grad():
        logits = [model(torch.tensor([text], device=devices.device())).logits[0].float().cpu() for text in texts]
    del model
    gc.collect()
    return logits


def engine_logits(
    folder: Path, checkpoint: CheckpointRef | None, dtype: str, texts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Compute the logits of a folder, read as ``--hf-checkpoint`` reads it, or of a checkpoint with Megatron-Core.

    Args:
        checkpoint: replaces the model of ``folder`` where it is not ``None``.
        dtype: precision of the model: fp32, bf16 or fp16.
        texts: token ids.

    Returns:
        logits of each text, fp32 [S, V] on the CPU.

    Raises:
        InputError: the model is not supported, or its files are damaged.
    """
    length = max(map(len, texts))
    opened = open_model(folder, checkpoint, dtype, {"data_path": "none", "seq_length": length})
    from mft_megatron.mcore.inference import logits_of, model_of

    with model_of(opened.arguments, opened.vocab_size, opened.source) as model:
        return [logits_of(model, text) for text in texts]

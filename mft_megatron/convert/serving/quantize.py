"""A Hugging Face folder in 4 bits, by GPTQ or AWQ: weights are rounded with an eye on what real text does to them.

::

    data set ─► samples of each task in turn ─► llmcompressor ─► folder in the compressed-tensors format

The library that rounds, llmcompressor, wants other versions of torch and transformers than this project, so it lives in
an environment of its own (examples/int4/requirements.txt), where of this project only what needs numpy is imported.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mft_megatron.convert.atomic_folder import refuse_content, replacing
from mft_megatron.convert.huggingface.model_folder import CONFIG, kept, read_config
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.errors import InputError

METHODS = ("gptq", "awq")
# 4 bits for weights in groups of so many columns, which have a scale in common
GROUP = 128
# what stays as it is: the output layer, and what routes tokens to experts
IGNORED = ("lm_head", "embed_out", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$", "re:.*shared_expert_gate$")
ENVIRONMENT = (
    "python -m venv int4 && int4/bin/pip install -r examples/int4/requirements.txt && int4/bin/pip install --no-deps ."
)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Texts as token ids, int64 each, and how many of them each task has."""

    texts: list[np.ndarray]
    by_task: dict[str, int]


def calibration(dataset: PackedDataset, split: str, count: int) -> Calibration:
    """Samples of a split, tasks in turn, so that a small one has its say; each task's evenly from all it has.

    Args:
        count: how many; fewer where the split has no more.

    Raises:
        InputError: the data set has no such split, or the split no sample.
    """
    slices = dataset.split(split).slices(slice(None))
    task_P = np.asarray(dataset.task_ids[slices.samples])
    waiting = [np.flatnonzero((task_P == task) & (slices.lengths > 1)) for task in range(len(dataset.tasks))]
    share = _in_turn([len(places) for places in waiting], count)
    texts, by_task = [], {}
    for name, places, number in zip(dataset.tasks, waiting, share, strict=True):
        taken = places[np.linspace(0, len(places), number, endpoint=False).astype(np.int64)]
        for place in taken:
            start = dataset.tokens.start_of(slices.samples[place]) + slices.starts[place]
            texts.append(np.asarray(dataset.tokens.items[start : start + slices.lengths[place]], np.int64))
        by_task[name] = number
    if not texts:
        raise InputError(f"--data-path {dataset.prefix}: its {split} split has no text; take another --split")
    return Calibration(texts, by_task)


def _in_turn(there: list[int], count: int) -> list[int]:
    """Of each task, how many: as equal as can be."""
    share = [0] * len(there)
    while count and any(number < limit for number, limit in zip(share, there, strict=True)):
        open_ = [task for task, limit in enumerate(there) if share[task] < limit]
        each = max(1, min(count // len(open_), min(there[task] - share[task] for task in open_)))
        for task in open_[:count] if each == 1 else open_:
            share[task] += each
            count -= each
    return share


def quantize(source: Path, target: Path, method: str, texts: list[np.ndarray]) -> None:
    """Write the model of the folder ``source`` with 4 bits a weight into the new folder ``target``.

    Args:
        method: one of ``METHODS``.
        texts: token ids, int64 each.

    Raises:
        InputError: llmcompressor is not installed here, ``target`` has content, or a weight cannot be divided in
            groups.
    """
    refuse_content(target, "--out")
    refuse_odd_sizes(source)
    try:
        import llmcompressor
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise InputError(f"{error}: run this tool in an environment of its own, made with {ENVIRONMENT}") from None
    if method == "awq" and not torch.accelerator.is_available():
        raise InputError("--method awq: llmcompressor needs a GPU for it; run it where there is one, or take gptq")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    texts_1S = [torch.from_numpy(text)[None] for text in texts]
    rows = [{"input_ids": text_1S, "attention_mask": torch.ones_like(text_1S)} for text_1S in texts_1S]
    model = llmcompressor.oneshot(
        model=model,
        # of batches that are made already; it then has no use for a tokenizer, but asks for one
        dataset=torch.utils.data.DataLoader(rows, batch_size=None),
        processor=object(),
        recipe=_recipe(method),
        num_calibration_samples=len(rows),
    )
    with replacing(target) as partial:
        model.save_pretrained(partial, save_compressed=True)
        for file in kept(source):
            copy = partial / file.relative_to(source)
            if not copy.exists():
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
        if "quantization_config" not in json.loads((partial / CONFIG).read_text()):
            raise InputError(f"{source}: llmcompressor left the model as it was; none of its layers was recognised")


def refuse_odd_sizes(source: Path) -> None:
    """Check that every matrix can be divided into groups of columns.

    Raises:
        InputError: a size is not a multiple of ``GROUP``.
    """
    config = read_config(source)
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if isinstance(config.get(name), int) and config[name] % GROUP:
            raise InputError(
                f"{source / CONFIG}: {name} {config[name]} is not a multiple of {GROUP}, a group of columns"
            )


def _recipe(method: str) -> list[Any]:
    """What llmcompressor is to do; symmetric groups for GPTQ, with a zero point for AWQ, as each is usually served."""
    if method == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(targets="Linear", scheme="W4A16", ignore=list(IGNORED))]
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier(), QuantizationModifier(targets=["Linear"], scheme="W4A16_ASYM", ignore=list(IGNORED))]

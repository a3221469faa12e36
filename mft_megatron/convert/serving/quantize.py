"""Export of a Hugging Face folder in 4 bits by GPTQ or AWQ, which round weights by their effect on real text.

::

    data set ─► samples of each task in turn ─► llmcompressor ─► folder in the compressed-tensors format

llmcompressor needs other versions of torch and transformers than this project, so it is installed in a separate
environment (examples/int4/requirements.txt), which has no Megatron-Core: nothing here may import it.
"""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mft_megatron.convert.atomic_folder import refuse_content, replacing
from mft_megatron.convert.huggingface.model_folder import CONFIG, copy_files, kept_files, read_config
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.finite import refuse_to_write

METHODS = ("gptq", "awq")
# columns that have a scale in common
GROUP = 128
# kept in full precision: the output layer, and the routers of experts
IGNORED = ("lm_head", "embed_out", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$", "re:.*shared_expert_gate$")
ENVIRONMENT = (
    "python -m venv int4 && int4/bin/pip install -r examples/int4/requirements.txt && int4/bin/pip install --no-deps ."
)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Text that shows which weights matter.

    Attributes:
        texts: token ids of each sample, int64 [S].
        by_task: number of samples of each task.
    """

    texts: list[npt.NDArray[np.int64]]
    by_task: dict[str, int]


def calibration(dataset: PackedDataset, split: str, count: int) -> Calibration:
    """Choose samples of a split: as many of each task as possible, spread evenly over the task's samples.

    Args:
        count: samples to choose; a smaller split gives all it has.

    Raises:
        InputError: the data set has no such split, or the split has no sample.
    """
    slices = dataset.split(split).slices(slice(None))
    task_P = np.asarray(dataset.task_ids[slices.samples])
    candidates = [np.flatnonzero((task_P == task) & (slices.lengths > 1)) for task in range(len(dataset.tasks))]
    counts = _even_counts([len(indices) for indices in candidates], count)
    texts, by_task = [], {}
    for name, indices, taken in zip(dataset.tasks, candidates, counts, strict=True):
        for index in indices[np.linspace(0, len(indices), taken, endpoint=False).astype(np.int64)]:
            start = dataset.tokens.start_of(slices.samples[index]) + slices.starts[index]
            texts.append(np.asarray(dataset.tokens.items[start : start + slices.lengths[index]], np.int64))
        by_task[name] = taken
    if not texts:
        raise InputError(f"--data-path {dataset.prefix}: its {split} split has no text; take another --split")
    return Calibration(texts, by_task)


def _even_counts(available: list[int], total: int) -> list[int]:
    """Distribute ``total`` over tasks as evenly as their available samples allow."""
    counts = [0] * len(available)
    while total and any(count < limit for count, limit in zip(counts, available, strict=True)):
        unfilled = [task for task, limit in enumerate(available) if counts[task] < limit]
        each = max(1, min(total // len(unfilled), min(available[task] - counts[task] for task in unfilled)))
        for task in unfilled[:total] if each == 1 else unfilled:
            counts[task] += each
            total -= each
    return counts


def quantize(source: Path, target: Path, method: str, texts: list[npt.NDArray[np.int64]]) -> None:
    """Write the model of the folder ``source`` with 4 bits a weight into the new folder ``target``.

    Args:
        method: one of ``METHODS``.
        texts: token ids of each sample, int64 [S].

    Raises:
        InputError: llmcompressor is not installed, ``target`` has content, a weight cannot be divided into groups, or
            what the library writes is not finite.
    """
    refuse_content(target, "--out")
    refuse_odd_sizes(source)
    try:
        import llmcompressor
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise InputError(f"{error}: run this tool in a separate environment, made with {ENVIRONMENT}") from None
    if method == "awq" and not torch.accelerator.is_available():
        raise InputError("--method awq: llmcompressor needs a GPU for it; run it where there is one, or take gptq")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False, use_safetensors=True)
    texts_1S = [torch.from_numpy(text)[None] for text in texts]
    rows = [{"input_ids": text_1S, "attention_mask": torch.ones_like(text_1S)} for text_1S in texts_1S]
    model = llmcompressor.oneshot(
        model=model,
        # the library takes batches that are ready; it asks for a tokenizer although it does not use it then
        dataset=torch.utils.data.DataLoader(rows, batch_size=None),  # type: ignore[arg-type]  # a list is a data set
        processor=object(),
        recipe=_recipe(method),
        num_calibration_samples=len(rows),
    )
    with replacing(target) as partial:
        model.save_pretrained(partial, save_compressed=True)
        _refuse_non_finite(partial)
        # the library's configuration describes the compressed weights; every other file is the source's
        absent = [file for file in kept_files(source) if not (partial / file.relative_to(source)).exists()]
        copy_files(absent, source, partial)
        if "quantization_config" not in read_config(partial):
            raise InputError(f"{source}: llmcompressor left the model as it was; none of its layers was recognised")


def refuse_odd_sizes(source: Path) -> None:
    """Check that every matrix can be divided into groups of columns.

    Raises:
        InputError: a size is not a multiple of ``GROUP``.
    """
    config = read_config(source)
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        size = config.get(name)
        if isinstance(size, int) and size % GROUP:
            raise InputError(f"{source / CONFIG}: {name} {size} is not a multiple of {GROUP}, a group of columns")


def _refuse_non_finite(folder: Path) -> None:
    """Check the weights that the library has written, one at a time: scales may be NaN where a matrix is.

    Raises:
        InputError: an element is NaN or infinite.
    """
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it cannot be iterated over)
                content = weights.get_tensor(name)
                if content.is_floating_point():
                    refuse_to_write(content, name)


def _recipe(method: str) -> list[object]:
    """Instructions for llmcompressor: symmetric groups for GPTQ, a zero point for AWQ, as each is usually served."""
    if method == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(targets="Linear", scheme="W4A16", ignore=list(IGNORED))]
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier(), QuantizationModifier(targets=["Linear"], scheme="W4A16_ASYM", ignore=list(IGNORED))]

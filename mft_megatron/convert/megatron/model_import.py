"""Import of a checkpoint of Megatron-LM or Megatron-Bridge as one of this project, for any parallel layout.

Both are ``torch_dist`` checkpoints of Megatron-Core: they hold whole weights whatever parallel layout wrote them, and
matrices have the same rows. The differences are the description of the architecture, a name for each layer, padding of
the vocabulary, and the states of a run. Weights stream through memory one at a time.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.atomic_folder import refuse_content
from mft_megatron.convert.huggingface.converted_checkpoint import describe, write_checkpoint
from mft_megatron.convert.huggingface.families.table import family_for
from mft_megatron.convert.huggingface.family import first_difference
from mft_megatron.convert.huggingface.model_folder import CONFIG, copy_kept_files, read_architecture
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.finite import refuse_non_finite
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from mft_megatron.mcore.checkpointing.tensor_writer import Weight
from mft_megatron.mcore.checkpointing.vocabulary import EMBEDDING, has_shape
from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from mft_megatron.mcore.platform.precisions import BY_DTYPE, model_dtype
from mft_megatron.run_folder.description import OF_NO_FAMILY, CheckpointInfo

from .description import find_checkpoint, read_description
from .weights import StackedWeight, stored_names, weights_of

# prefixes of the states of a run
_RUN_STATES = ("optimizer.", "chained_", "rng_state", "rerun_state_machine")


def import_megatron(
    folder: Path, target: Path, vocab_size: int | None = None, hf: Path | None = None, step: int | None = None
) -> tuple[Path, CheckpointInfo]:
    """Write the model of a checkpoint into the new run folder ``target``, in this process alone.

    Args:
        folder: folder with ``latest_checkpointed_iteration.txt``, or that of one checkpoint.
        target: folder to create; must not exist, or be empty.
        vocab_size: tokens, without padding; ``None``: as ``hf`` or the checkpoint says.
        hf: Hugging Face folder of the same architecture, whose configuration and tokenizer an export gets.
        step: iteration to convert; ``None``: the newest.

    Returns:
        the checkpoint that was read, and the description of the one that was written.

    Raises:
        InputError: it is no such checkpoint, cannot be expressed, a weight is missing, left over or of another shape,
            or ``target`` has content.
    """
    refuse_content(target, "--save")
    path = find_checkpoint(folder, step)
    architecture, known = read_description(path)
    reader = TensorReader(path)
    size = _vocab_size(path, reader, vocab_size, known, _vocab_size_of_hf(hf, architecture))
    expected = weights_of(architecture, size)
    refuse_mismatch(path, reader, expected)
    weights = {one.name: Weight(one.name, (*one.stack, *one.shape), _dtype(reader, one)) for one in expected}
    slices = [
        WeightSlice(one.name, index, (0,) * len(one.shape), one.shape) for one in expected for index in one.indices
    ]
    dtype = model_dtype((weight.shape, weight.dtype) for weight in weights.values())
    info = describe(_source(hf, architecture), architecture, size, dtype)
    content = _MegatronSource(path, reader, weights)
    write_checkpoint(target, info, weights, slices, content, lambda kept: _keep(hf, architecture, size, kept))
    return path, info


def _vocab_size_of_hf(hf: Path | None, architecture: NetworkArguments) -> int | None:
    """Vocabulary of a Hugging Face folder.

    Raises:
        InputError: the folder has another architecture.
    """
    if hf is None:
        return None
    _, expected, vocab_size = read_architecture(hf)
    if difference := first_difference(architecture, expected):
        name, has, says = difference
        raise InputError(f"--hf {hf}: {name} is {says}, the checkpoint has {has}; it is another model")
    return vocab_size


def _vocab_size(path: Path, reader: TensorReader, option: int | None, known: int | None, of_hf: int | None) -> int:
    """Vocabulary by ``--vocab-size``, the Hugging Face folder, or the checkpoint's description, in this order."""
    if not reader.has_entry(EMBEDDING):
        raise InputError(f"{path}: has no {EMBEDDING}; it holds no whole model")
    rows = reader.entry(EMBEDDING)[0][0]
    size = option or of_hf or known
    if size is None:
        raise InputError(
            f"{path}: has {rows} rows of vocabulary, padding counted in, and does not say how many tokens there are; "
            "give --vocab-size N, or --hf DIR"
        )
    if not 0 < size <= rows:
        raise InputError(f"{path}: has {rows} rows of vocabulary, not the {size} that are wanted; correct --vocab-size")
    return size


def refuse_mismatch(path: Path, reader: TensorReader, expected: Sequence[StackedWeight]) -> None:
    """Check that a checkpoint holds exactly the expected weights.

    Raises:
        InputError: a weight is missing, left over, of another shape, or of an unknown dtype.
    """
    used = set()
    for weight in expected:
        for index in weight.indices:
            name, inner_index = _stored_name(reader, weight.name, index)
            if not reader.has_entry(name):
                raise InputError(f"{path}: has no {name}; it is not of the architecture that it says")
            used.add(name)
            shape, dtype = reader.entry(name)
            wanted = (*weight.stack[len(weight.stack) - len(inner_index) :], *weight.shape)
            if not has_shape(weight.name, shape, wanted):
                raise InputError(f"{path}: {name} has the shape {list(shape)}, its description says {list(wanted)}")
            if dtype not in BY_DTYPE:
                raise InputError(f"{path}: {name} is {dtype}; only fp32, bf16 and fp16 can be read")
    left = sorted(name for name in set(reader.names()) - used if not name.startswith(_RUN_STATES))
    if left := [name for name in left if not name.endswith("_extra_state")]:
        more = f" and {len(left) - 2} more" if len(left) > 2 else ""
        raise InputError(f"{path}: {', '.join(left[:2])}{more} not known in this architecture")


def _stored_name(reader: TensorReader, name: str, index: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Name and index in the stored stack of a weight; if it is not stored, the first that it could have."""
    candidates = stored_names(name, index)
    return next((candidate for candidate in candidates if reader.has_entry(candidate[0])), candidates[0])


def _dtype(reader: TensorReader, weight: StackedWeight) -> torch.dtype:
    return reader.entry(_stored_name(reader, weight.name, next(weight.indices))[0])[1]


class _MegatronSource:
    """A :class:`WeightSource` of whole weights of one layer and expert, without the padding of the vocabulary."""

    def __init__(self, path: Path, reader: TensorReader, weights: Mapping[str, Weight]):
        self._path, self._reader, self._weights = path, reader, weights

    def read(self, wanted: WeightSlice) -> Tensor:
        name, index = _stored_name(self._reader, wanted.name, wanted.index)
        weight = self._reader.read(name, index)
        refuse_non_finite(weight, f"{self._path}: {name} {list(index) or ''}", "take an earlier checkpoint")
        return weight[wanted.region].to(self._weights[wanted.name].dtype)


def _source(hf: Path | None, architecture: NetworkArguments) -> str:
    """Hugging Face architecture that an export is written as, or :data:`OF_NO_FAMILY` if none can express the model."""
    if hf is not None:
        return read_architecture(hf)[0].architecture
    try:
        return family_for(architecture).architecture
    except InputError:
        return OF_NO_FAMILY


def _keep(hf: Path | None, architecture: NetworkArguments, vocab_size: int, folder: Path) -> None:
    """Write the files of an export besides weights: those of ``hf``, or a configuration if a family can express it."""
    if hf is not None:
        copy_kept_files(hf, folder)
        return
    try:
        family = family_for(architecture)
    except InputError:
        return
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({**family.write_config(architecture), "vocab_size": vocab_size}, indent=2))

"""A checkpoint of Megatron-LM or Megatron-Bridge as one of this project, which ``--load`` takes at any layout.

Both are ``torch_dist`` checkpoints of Megatron-Core: weights are whole, whatever layout wrote them, and matrices have
the same rows. What differs is what stands around them (who says the architecture), names for each layer, a vocabulary
that is padded to the layout, and states that belong to a run there. Weights stream through memory one at a time.
"""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.atomic_folder import refuse_content, replacing
from mft_megatron.convert.huggingface.families.table import family_for
from mft_megatron.convert.huggingface.family import first_difference
from mft_megatron.convert.huggingface.model_folder import CONFIG, copy_kept_files, read_architecture
from mft_megatron.convert.huggingface.model_import import FILE_BYTES, describe
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from mft_megatron.mcore.checkpointing.tensor_writer import Weight, write_weights
from mft_megatron.mcore.checkpointing.vocabulary import EMBEDDING, has_shape
from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from mft_megatron.mcore.platform.precisions import BY_DTYPE, model_dtype
from mft_megatron.run_folder import (
    HUGGINGFACE,
    INFO,
    OF_NO_FAMILY,
    TRACKER,
    CheckpointInfo,
    iteration_folder,
    replace_text,
    write_info,
)

from .arguments import read_bridge, read_megatron_lm
from .common_pt import COMMON, read_args, read_common
from .weights import Stored, names_there, weights_of

RUN_CONFIG = "run_config.yaml"
INDEX = ".metadata"
# what is stored besides the model
_OF_A_RUN = ("optimizer.", "chained_", "rng_state", "rerun_state_machine")


def import_megatron(
    folder: Path, target: Path, vocab_size: int | None = None, hf: Path | None = None, step: int | None = None
) -> tuple[Path, CheckpointInfo]:
    """Write the model of a checkpoint into the new run folder ``target``, in this process alone.

    Args:
        folder: with ``latest_checkpointed_iteration.txt``, or one checkpoint's own folder.
        vocab_size: of the tokenizer, without padding; ``None``: as the checkpoint or ``hf`` says.
        hf: Hugging Face folder of the same architecture, whose configuration and tokenizer an export is to have.
        step: the iteration to take; ``None``: the newest.

    Returns:
        the checkpoint that was read, and the description of the one that was written.

    Raises:
        InputError: it is no such checkpoint, cannot be expressed, lacks a weight or has one too many or of another
            shape, or ``target`` has content.
    """
    refuse_content(target, "--save")
    path = find_checkpoint(folder, step)
    architecture, known = read_description(path)
    reader = TensorReader(path)
    vocab_size = _vocab_size(path, reader, vocab_size, known, _of_hf(hf, architecture))
    stored = weights_of(architecture, vocab_size)
    refuse_mismatch(path, reader, stored)
    weights = {one.name: Weight(one.name, (*one.stack, *one.shape), _dtype(reader, one)) for one in stored}
    slices = [WeightSlice(one.name, place, (0,) * len(one.shape), one.shape) for one in stored for place in one.places]
    with replacing(target) as partial:
        written = iteration_folder(partial, 0)
        written.mkdir()
        write_weights(written, weights, slices, _WholeWeights(reader, weights), FILE_BYTES)
        source = _keep(hf, architecture, vocab_size, partial / HUGGINGFACE)
        dtype = model_dtype((weight.shape, weight.dtype) for weight in weights.values())
        info = describe(source, architecture, vocab_size, dtype)
        write_info(written, info)
        replace_text(partial / TRACKER, "0\n")
    return path, info


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The ``torch_dist`` checkpoint in ``folder``: of ``step``, the newest by the tracker file, or ``folder`` itself.

    Raises:
        InputError: there is none, or it is one of another format or of this project.
    """
    path = folder
    if not (folder / INDEX).is_file():
        if step is not None:
            path = iteration_folder(folder, step)
        elif (folder / TRACKER).is_file():
            text = (folder / TRACKER).read_text().strip()
            path = iteration_folder(folder, int(text)) if text.isdecimal() else folder / "release"
        elif found := sorted(folder.glob("iter_*")):
            path = found[-1]
    if (path / INFO).is_file():
        raise InputError(f"--load {path}: is a checkpoint of this program; pretrain_mft.py takes it with --load")
    if not (path / INDEX).is_file():
        raise InputError(
            f"--load {path}: no {INDEX} there, so it is no torch_dist checkpoint; Megatron-LM writes one of another "
            "format anew with --ckpt-convert-format torch_dist"
        )
    return path


def read_description(path: Path) -> tuple[NetworkArguments, int | None]:
    """What a checkpoint says that it is: architecture, and the size of the vocabulary where it says that, too.

    Raises:
        InputError: it says nothing, or what this program cannot express.
    """
    args, file = read_args(read_common(path)), path / RUN_CONFIG
    try:
        if args is not None:
            return read_megatron_lm(args), _vocab_size_of_args(args)
        if file.is_file():
            model = _model_section(file)
            size = model.get("vocab_size")
            return read_bridge(model), size if isinstance(size, int) else None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path}: its description of the model is damaged ({error})") from None
    raise InputError(f"{path}: neither args in {COMMON} nor {RUN_CONFIG}, so nothing says what model this is")


def _model_section(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{RUN_CONFIG} is damaged ({' '.join(str(error).split())})") from None
    section = content.get("model") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise InputError(f"{RUN_CONFIG} has no section model")
    return section


def _vocab_size_of_args(args: dict[str, Any]) -> int | None:
    """``--vocab-size`` of Megatron-LM, which a run with a tokenizer need not give."""
    size = args.get("vocab_size")
    if not isinstance(size, int):
        return None
    return size + 1 if args.get("tokenizer_type") == "NullTokenizer" else size  # it adds an end of document


def _of_hf(hf: Path | None, architecture: NetworkArguments) -> int | None:
    """Size of the vocabulary of a Hugging Face folder, which must be of the same architecture."""
    if hf is None:
        return None
    _, expected, vocab_size = read_architecture(hf)
    if difference := first_difference(architecture, expected):
        name, has, says = difference
        raise InputError(f"--hf {hf}: {name} is {says}, the checkpoint has {has}; it is another model")
    return vocab_size


def _vocab_size(path: Path, reader: TensorReader, given: int | None, known: int | None, of_hf: int | None) -> int:
    if not reader.has_entry(EMBEDDING):
        raise InputError(f"{path}: has no {EMBEDDING}; it holds no whole model")
    rows = reader.entry(EMBEDDING)[0][0]
    size = given or of_hf or known
    if size is None:
        raise InputError(
            f"{path}: has {rows} rows of vocabulary, padding counted in, and does not say how many tokens there are; "
            "give --vocab-size N, or --hf DIR"
        )
    if not 0 < size <= rows:
        raise InputError(f"{path}: has {rows} rows of vocabulary, not the {size} that are wanted; correct --vocab-size")
    return size


def refuse_mismatch(path: Path, reader: TensorReader, stored: list[Stored]) -> None:
    """Check that a checkpoint holds exactly these weights.

    Raises:
        InputError: one is missing, left over, of another shape, or of a dtype that is not known here.
    """
    used = set()
    for one in stored:
        for place in one.places:
            name, inner = _source(reader, one.name, place)
            if not reader.has_entry(name):
                raise InputError(f"{path}: has no {name}; it is not of the architecture that it says")
            used.add(name)
            shape, dtype = reader.entry(name)
            wanted = (*one.stack[len(one.stack) - len(inner) :], *one.shape)
            if not has_shape(one.name, shape, wanted):
                raise InputError(f"{path}: {name} has the shape {list(shape)}, its description says {list(wanted)}")
            if dtype not in BY_DTYPE:
                raise InputError(f"{path}: {name} is {dtype}; only fp32, bf16 and fp16 can be read")
    left = sorted(name for name in set(reader.names()) - used if not name.startswith(_OF_A_RUN))
    if left := [name for name in left if not name.endswith("_extra_state")]:
        more = f" and {len(left) - 2} more" if len(left) > 2 else ""
        raise InputError(f"{path}: {', '.join(left[:2])}{more} not known in this architecture")


def _source(reader: TensorReader, name: str, place: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Where the part of a weight is; of those that it could be, the first where it is nowhere."""
    found = names_there(name, place)
    return next((one for one in found if reader.has_entry(one[0])), found[0])


def _dtype(reader: TensorReader, one: Stored) -> torch.dtype:
    return reader.entry(_source(reader, one.name, next(one.places))[0])[1]


class _WholeWeights:
    """A source of whole weights of one layer and expert, without the rows that pad the vocabulary."""

    def __init__(self, reader: TensorReader, weights: dict[str, Weight]):
        self._reader, self._weights = reader, weights

    def read(self, wanted: WeightSlice) -> Tensor:
        weight = self._reader.read(*_source(self._reader, wanted.name, wanted.index))
        return weight[wanted.region].to(self._weights[wanted.name].dtype)


def _keep(hf: Path | None, architecture: NetworkArguments, vocab_size: int, target: Path) -> str:
    """Put into ``target`` what an export gives back; the Hugging Face architecture, or where none can express the
    model, what it came from."""
    if hf is not None:
        copy_kept_files(hf, target)
        return read_architecture(hf)[0].architecture
    try:
        family = family_for(architecture)
    except InputError:
        return OF_NO_FAMILY
    target.mkdir()
    (target / CONFIG).write_text(json.dumps({**family.write_config(architecture), "vocab_size": vocab_size}, indent=2))
    return family.architecture

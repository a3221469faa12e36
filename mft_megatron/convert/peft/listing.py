"""Which adapters there are in and below some folders: checkpoints of this program that have some, and PEFT folders."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mft_megatron.convert.huggingface.safetensors_reader import StoredWeight, read_header
from mft_megatron.errors import InputError
from mft_megatron.lora import is_adapter
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from mft_megatron.mcore.platform.precisions import BY_DTYPE
from mft_megatron.run_folder import INFO, read_info

from .adapter_reader import lora_of
from .config import CONFIG, WEIGHTS, read_config

_HEADER = ("adapter", "kind", "iteration", "packs", "rank", "alpha", "rsLoRA", "on", "MB", "dtype", "base")
_RIGHT = {"iteration", "packs", "rank", "alpha", "MB"}


@dataclasses.dataclass(frozen=True)
class Found:
    """One adapter. ``kind``: checkpoint (with its model), adapters (a checkpoint of them alone) or PEFT; ``iteration``
    and ``packs``, how many it was trained on, where that is known; ``size``: of its matrices, in bytes."""

    path: Path
    kind: str
    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    size: int
    dtype: str
    base: str
    iteration: int | None = None
    packs: int | None = None


def find(folders: Iterable[Path]) -> tuple[list[Found], list[str]]:
    """The adapters in and below ``folders``, by path, and a line about each that could not be read.

    Raises:
        InputError: one of ``folders`` does not exist.
    """
    found, notes = [], []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: is no folder; give folders of runs or of adapters")
        for path in _candidates(folder):
            try:
                one = _checkpoint(path) if (path / INFO).is_file() else _peft(path)
            except InputError as error:
                notes.append(str(error))
                continue
            if one is not None and all(one.path != other.path for other in found):
                found.append(one)
    return found, notes


def table(found: Sequence[Found]) -> str:
    """A line for each, under a header."""
    lines = [_HEADER, *map(_cells, found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for cell, width, name in zip(line, widths, _HEADER, strict=True)
        ).rstrip()
        for line in lines
    )


def _candidates(folder: Path) -> Iterator[Path]:
    """Folders that hold an adapter, it may be; what is being written is passed over."""
    for root, inside, files in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if INFO in files or CONFIG in files:
            yield Path(root)


def _checkpoint(path: Path) -> Found | None:
    info = read_info(path)
    if info.lora is None:
        return None
    lora, reader = lora_of(path, info), TensorReader(path)
    entries = [reader.entry(name) for name in reader.names() if is_adapter(name)]
    return Found(
        path,
        "checkpoint" if info.has_base else "adapters",
        lora.rank,
        lora.alpha,
        lora.rslora,
        tuple(name for target in lora.targets for name in target.names),
        sum(math.prod(shape) * dtype.itemsize for shape, dtype in entries),
        _some(str(dtype).removeprefix("torch.") for _, dtype in entries),
        info.base,
        info.iteration,
        info.consumed_samples,
    )


def _peft(path: Path) -> Found:
    config = read_config(path)
    if not (path / WEIGHTS).is_file():
        raise InputError(f"{path}: has {CONFIG}, but no {WEIGHTS}")
    stored = read_header(path / WEIGHTS)
    leaves = dict.fromkeys(key.split(".lora_")[0].rpartition(".")[2] for key in stored)
    return Found(
        path,
        "PEFT",
        config.rank,
        config.alpha,
        config.rslora,
        tuple(leaves),
        sum(map(_bytes, stored.values())),
        _some(BY_DTYPE[weight.dtype].huggingface for weight in stored.values()),
        config.base,
    )


def _bytes(weight: StoredWeight) -> int:
    return math.prod(weight.shape) * weight.dtype.itemsize


def _some(dtypes: Iterable[str]) -> str:
    return "+".join(sorted(set(dtypes)))


def _cells(one: Found) -> tuple[str, ...]:
    return (
        str(one.path),
        one.kind,
        "-" if one.iteration is None else f"{one.iteration:,}",
        "-" if one.packs is None else f"{one.packs:,}",
        str(one.rank),
        f"{one.alpha:g}",
        "yes" if one.rslora else "no",
        ",".join(one.targets),
        f"{one.size / 10**6:.1f}",
        one.dtype,
        one.base or "-",
    )

"""A list of the adapters in and below some folders: checkpoints of this program that have some, and PEFT folders."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from mft_megatron.convert.huggingface.safetensors_reader import read_header
from mft_megatron.errors import InputError
from mft_megatron.lora import is_adapter
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from mft_megatron.mcore.platform.precisions import BY_DTYPE
from mft_megatron.run_folder.description import CheckpointRef, read_info
from mft_megatron.run_folder.names import INFO

from .adapter_reader import lora_of_checkpoint
from .config import CONFIG, WEIGHTS, read_config

_HEADER = ("adapter", "kind", "iteration", "packs", "rank", "alpha", "rsLoRA", "on", "MB", "dtype", "base")
_RIGHT_ALIGNED = {"iteration", "packs", "rank", "alpha", "MB"}


@dataclasses.dataclass(frozen=True)
class ListedAdapter:
    """One adapter of the list.

    Attributes:
        path: its folder.
        kind: ``checkpoint`` (with its model), ``adapters`` (a checkpoint of adapters alone) or ``PEFT``.
        rank: rank of an A.
        alpha: alpha of the scale.
        rslora: whether the scale is alpha / √rank.
        targets: names of the adapted matrices.
        size: bytes of all A's and B's.
        dtypes: names of their dtypes.
        base: name or folder of the base model; may be empty.
        iteration: iterations that it was trained for, if they are known.
        packs: packs that it was trained on, if they are known.
    """

    path: Path
    kind: str
    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    size: int
    dtypes: str
    base: str
    iteration: int | None = None
    packs: int | None = None


def find_adapters(folders: Iterable[Path]) -> tuple[list[ListedAdapter], list[str]]:
    """List the adapters in and below ``folders``, by path, and a line about each that could not be read.

    Raises:
        InputError: one of ``folders`` does not exist.
    """
    adapters: list[ListedAdapter] = []
    notes = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: is no folder; give folders of runs or of adapters")
        for path in _candidates(folder):
            try:
                adapter = _checkpoint(path) if (path / INFO).is_file() else _peft(path)
            except InputError as error:
                notes.append(str(error))
                continue
            if adapter is not None and all(adapter.path != other.path for other in adapters):
                adapters.append(adapter)
    return adapters, notes


def table(adapters: Sequence[ListedAdapter]) -> str:
    """Format adapters as a table: a header, and a line for each."""
    lines = [_HEADER, *map(_cells, adapters)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in _RIGHT_ALIGNED else cell.ljust(width)
            for cell, width, name in zip(line, widths, _HEADER, strict=True)
        ).rstrip()
        for line in lines
    )


def _candidates(folder: Path) -> Iterator[Path]:
    """Folders that may hold an adapter; hidden ones, which are still being written, are skipped."""
    for root, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if INFO in files or CONFIG in files:
            yield Path(root)


def _checkpoint(path: Path) -> ListedAdapter | None:
    info = read_info(path)
    if info.lora is None:
        return None
    lora, reader = lora_of_checkpoint(CheckpointRef(path, info)), TensorReader(path)
    weights = [reader.entry(name) for name in reader.names() if is_adapter(name)]
    return ListedAdapter(
        path=path,
        kind="checkpoint" if info.has_base else "adapters",
        rank=lora.rank,
        alpha=lora.alpha,
        rslora=lora.rslora,
        targets=tuple(name for target in lora.targets for name in target.names),
        size=_bytes(weights),
        dtypes=_names(dtype for _, dtype in weights),
        base=info.base,
        iteration=info.iteration,
        packs=info.consumed_samples,
    )


def _peft(path: Path) -> ListedAdapter:
    config = read_config(path)
    if not (path / WEIGHTS).is_file():
        raise InputError(f"{path}: has {CONFIG}, but no {WEIGHTS}")
    stored = read_header(path / WEIGHTS)
    weights = [(weight.shape, weight.dtype) for weight in stored.values()]
    return ListedAdapter(
        path=path,
        kind="PEFT",
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        targets=tuple(dict.fromkeys(key.split(".lora_")[0].rpartition(".")[2] for key in stored)),
        size=_bytes(weights),
        dtypes=_names(dtype for _, dtype in weights),
        base=config.base,
    )


def _bytes(weights: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in weights)


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return "+".join(sorted({BY_DTYPE[dtype].huggingface for dtype in dtypes}))


def _cells(adapter: ListedAdapter) -> tuple[str, ...]:
    return (
        str(adapter.path),
        adapter.kind,
        "-" if adapter.iteration is None else f"{adapter.iteration:,}",
        "-" if adapter.packs is None else f"{adapter.packs:,}",
        str(adapter.rank),
        f"{adapter.alpha:g}",
        "yes" if adapter.rslora else "no",
        ",".join(adapter.targets),
        f"{adapter.size / 10**6:.1f}",
        adapter.dtypes,
        adapter.base or "-",
    )

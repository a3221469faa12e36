"""Arrays of a data set, memory-mapped; files compared with the ledger."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mft_megatron.disk_errors import is_of_disk
from mft_megatron.errors import InputError

from .ledger import ArrayEntry, file_sha256, ledger_path
from .mapped_files import watched

# dtype of _task_ids.npy, the task of each sample
TASK_ID_DTYPE = np.uint16


def check_files(prefix: str | Path, arrays: Mapping[str, ArrayEntry], hashes: bool) -> None:
    """Compare files of a data set with the ledger's entries for them.

    Args:
        prefix: of the data set.
        arrays: entries of the ledger, by suffix.
        hashes: compare contents too, not only sizes.

    Raises:
        InputError: a file is missing or differs; the message names the first one.
    """
    remedy = "it is not the file the ledger was written for; preprocess the data again"
    for suffix, entry in arrays.items():
        path = Path(f"{prefix}{suffix}")
        if not path.is_file():
            raise InputError(f"{path}: missing, though {ledger_path(prefix).name} lists it; preprocess the data again")
        if path.stat().st_size != entry.size:
            raise InputError(f"{path}: {path.stat().st_size} bytes, the ledger says {entry.size}; {remedy}")
        if hashes and file_sha256(path) != entry.sha256:
            raise InputError(f"{path}: its content differs from the ledger's sha256; {remedy}")


def load_array(path: str | Path, dtype: type[np.generic], axes: int) -> np.ndarray:
    """Memory-map an array of the data set.

    Args:
        path: of the ``.npy`` file.
        dtype: that it must have.
        axes: that it must have.

    Raises:
        InputError: the file is damaged, or has another dtype or number of axes.
        OSError: the device fails.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except Exception as error:  # a damaged header can raise any exception
        if isinstance(error, OSError) and is_of_disk(error):
            raise
        raise InputError(f"{path}: damaged ({' '.join(str(error).split())}); preprocess the data again") from None
    if array.dtype != dtype or array.ndim != axes:
        raise InputError(f"{path}: damaged, {array.dtype} with {array.ndim} axes; preprocess the data again")
    return watched(array, path)


def load_task_ids(prefix: str | Path) -> np.ndarray:
    """Memory-map the task of each sample of the data set ``prefix``, uint16 [samples].

    Raises:
        InputError: the file is damaged.
    """
    return load_array(f"{prefix}_task_ids.npy", TASK_ID_DTYPE, 1)

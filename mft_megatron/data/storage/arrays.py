"""Files of a data set, opened in place and compared with the ledger."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mft_megatron.data.storage.ledger import ArrayEntry, file_sha256, ledger_path
from mft_megatron.errors import InputError


def check_files(prefix: str, arrays: Mapping[str, ArrayEntry], hashes: bool) -> None:
    """Compare files of a data set with what its ledger says of them.

    Raises:
        InputError: the first file that is missing or differs in size or, with ``hashes``, in content.
    """
    remedy = "it is not the file the ledger was written for; preprocess the data again"
    for name, entry in arrays.items():
        path = Path(prefix + name)
        if not path.is_file():
            raise InputError(f"{path}: missing, though {ledger_path(prefix).name} lists it; preprocess the data again")
        if path.stat().st_size != entry.size:
            raise InputError(f"{path}: {path.stat().st_size} bytes, the ledger says {entry.size}; {remedy}")
        if hashes and file_sha256(path) != entry.sha256:
            raise InputError(f"{path}: its content differs from the ledger's sha256; {remedy}")


def load_array(path: str, dtype: type, axes: int) -> np.ndarray:
    """An array of the data set, memory-mapped.

    Raises:
        InputError: it is no such array.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except Exception as error:  # a damaged header may say anything
        raise InputError(f"{path}: damaged ({' '.join(str(error).split())}); preprocess the data again") from None
    if array.dtype != dtype or array.ndim != axes:
        raise InputError(f"{path}: damaged, {array.dtype} with {array.ndim} axes; preprocess the data again")
    return array

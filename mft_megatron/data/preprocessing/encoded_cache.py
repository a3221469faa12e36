"""A cache of encoded batches, so that nothing is tokenised twice.

The key of an entry is a hash of the batch's records and of everything that decides how they are encoded. A run that is
continued after it was killed, a file that has grown, another data set with the same task: all read the entries that
exist. Each entry is an ``.npz`` file, renamed to its name when it is complete; its checksums are compared when it is
read.
"""

import collections
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.storage.dataset_writer import report_full_disk
from mft_megatron.data.tasks.record_batches import RecordBatch

from .encoded_batch import Drop, EncodedBatch

# raise it when the same records are encoded otherwise than before
VERSION = 9
# arrays of a batch that are only there where some weight is neither 0 nor 1
_WEIGHTS = ("token_weights", "sample_weights")


class EncodedCache:
    """A folder of entries.

    Attributes:
        folder: of the entries.
        reused: number of entries that have been read from it.
    """

    def __init__(self, folder: Path):
        """Use ``folder``, which need not exist."""
        self.folder = folder
        self.reused = 0

    def key(self, batch: RecordBatch, fingerprint: str) -> str:
        """Key of a batch; ``fingerprint`` represents everything that decides how it is encoded."""
        # lines are cut after line breaks, items of an array at brackets, so the same bytes may be other records
        digest = hashlib.sha256(f"{VERSION}/{fingerprint}/{batch.of_array}/{len(batch.lines)}/".encode())
        lines = [line for line in batch.lines if isinstance(line, bytes)]
        digest.update(b"".join(lines) if len(lines) == len(batch.lines) else pickle.dumps(batch.lines))
        return digest.hexdigest()

    def read(self, key: str, batch: RecordBatch) -> EncodedBatch | None:
        """Read the entry of a batch; ``None`` where there is none or it is damaged."""
        try:
            with open(self._path(key), "rb") as file:
                encoded = read_encoded(file, batch.path, batch.first_line, batch.of_array)
        except FileNotFoundError:
            return None
        except Exception:  # an entry that is damaged in any way is made again
            self._path(key).unlink(missing_ok=True)
            return None
        self.reused += 1
        return encoded

    def write(self, key: str, batch: RecordBatch, encoded: EncodedBatch) -> None:
        """Write the entry of a batch.

        Raises:
            InputError: the disk is full.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with report_full_disk(path, "--cache-dir or --output-prefix"), open(unfinished, "wb") as file:
                write_encoded(file, encoded, batch.first_line)
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def entries(self) -> int:
        """Count the entries in the folder."""
        return sum(1 for _ in self.folder.glob("*/*.npz"))

    def remove(self) -> None:
        """Remove the whole folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"


def write_encoded(file: BinaryIO, encoded: EncodedBatch, first_line: int) -> None:
    """Write a batch in the format of the cache.

    Args:
        file: that is empty.
        encoded: the batch.
        first_line: of its records; the entry does not depend on where in a file the records are.
    """
    np.savez(
        file,
        ids=encoded.ids.astype(np.uint16) if encoded.ids.max(initial=0) < 1 << 16 else encoded.ids,
        mask=np.packbits(encoded.mask),
        lengths=encoded.lengths,
        counts=np.array([encoded.records, encoded.documents, encoded.filled, encoded.chats, encoded.added]),
        drops=_as_bytes([[drop.line - first_line, drop.reason, drop.message] for drop in encoded.drops]),
        examples=_as_bytes(encoded.examples),
        notes=_as_bytes([encoded.notes.unread_keys, encoded.notes.kinds]),
        **{name: weights for name in _WEIGHTS if (weights := getattr(encoded, name)) is not None},
    )


def read_encoded(file: BinaryIO, path: str, first_line: int, of_array: bool) -> EncodedBatch:
    """Read a batch that :func:`write_encoded` wrote; its checksums are compared.

    Args:
        file: that holds it alone.
        path, first_line, of_array: where the records of the batch are, as in :class:`.encoded_batch.Drop`.

    Raises:
        Exception: of any kind, where the file is damaged.
    """
    with np.load(file) as entry:
        records, documents, filled, chats, added = entry["counts"].tolist()
        ids = entry["ids"].astype(np.int32)
        return EncodedBatch(
            ids=ids,
            mask=np.unpackbits(entry["mask"], count=len(ids)),
            lengths=entry["lengths"],
            records=records,
            documents=documents,
            filled=filled,
            notes=RecordNotes(*map(collections.Counter, json.loads(entry["notes"].tobytes()))),
            chats=chats,
            added=added,
            examples=json.loads(entry["examples"].tobytes()),
            drops=[
                Drop(path, first_line + line, reason, message, of_array)
                for line, reason, message in json.loads(entry["drops"].tobytes())
            ],
            **{name: entry[name] for name in _WEIGHTS if name in entry},
        )


def _as_bytes(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)

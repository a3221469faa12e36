"""Encoded batches by what they were made of, so that nothing is tokenised twice.

A part's name is a hash of the batch's content and of everything that decides how it is encoded. A run that is
continued after it was killed, a file that has grown, another data set with the same task: whatever has been encoded
before is read instead. Each part is a ``.npz`` file, put in place when it is complete; its checksums are compared when
it is read.
"""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np

from mft_megatron.data.storage.dataset_writer import report_full_disk
from mft_megatron.data.tasks.record_batches import RecordBatch

from .encoding import Drop, EncodedBatch

VERSION = 2  # of what encoding makes of the same input; raise it when that changes


class EncodedCache:
    """A folder of parts. ``reused``: how many have been read from it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.reused = 0

    def key(self, batch: RecordBatch, fingerprint: str) -> str:
        """Name of a batch's part; ``fingerprint`` stands for how it is to be encoded."""
        digest = hashlib.sha256(f"{VERSION}/{fingerprint}/{len(batch.lines)}/".encode())
        lines = all(isinstance(line, bytes) for line in batch.lines)
        digest.update(b"".join(batch.lines) if lines else pickle.dumps(batch.lines))
        return digest.hexdigest()

    def read(self, key: str, batch: RecordBatch) -> EncodedBatch | None:
        """The part of a batch, ``None`` where there is none or it is damaged."""
        try:
            with open(self._path(key), "rb") as file, np.load(file) as part:
                records, documents, filled = part["counts"].tolist()
                drops = json.loads(part["drops"].tobytes())
                encoded = EncodedBatch(
                    ids=part["ids"],
                    mask=part["mask"],
                    lengths=part["lengths"],
                    records=records,
                    documents=documents,
                    filled=filled,
                    drops=[Drop(batch.path, batch.first_line + line, *what) for line, *what in drops],
                )
        except FileNotFoundError:
            return None
        except Exception:  # whatever is wrong with it, it is made again
            self._path(key).unlink(missing_ok=True)
            return None
        self.reused += 1
        return encoded

    def write(self, key: str, batch: RecordBatch, encoded: EncodedBatch) -> None:
        """Keep what became of a batch."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        drops = [[drop.line - batch.first_line, drop.reason, drop.message] for drop in encoded.drops]
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with report_full_disk(path, "--cache-dir or --output-prefix"), open(unfinished, "wb") as file:
                np.savez(
                    file,
                    ids=encoded.ids,
                    mask=encoded.mask,
                    lengths=encoded.lengths,
                    counts=np.array([encoded.records, encoded.documents, encoded.filled]),
                    drops=np.frombuffer(json.dumps(drops).encode(), np.uint8),
                )
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Remove the whole folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.npz"

"""One file of a task, read once and in order: lines of JSON, plain or compressed, rows of a table, or tokens.

Only a batch is in memory at a time, and of a compressed file one block; a line is never cut. What a file was, for the
ledger, is known when it has been read: bytes and sha256 are those of the file on disk.
"""

import hashlib
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mft_megatron.data.storage.indexed_dataset import IndexedDataset
from mft_megatron.data.storage.ledger import InputFile
from mft_megatron.errors import InputError

from .record_batches import RecordBatch, TokenizedBatch

BATCH_BYTES = 1 << 20
BATCH_RECORDS = 1 << 12  # a batch of tiny records would otherwise be very many of them
IDS, MASK = "_input_ids", "_loss_mask"  # how the names of MFTCoder's pairs end, before .idx and .bin
_BLOCK, _SLICE = 1 << 16, 1 << 12  # compressed input that is read, and that is unpacked into memory, at once
_BOM = b"\xef\xbb\xbf"


def files_on_disk(path: Path) -> list[Path]:
    """The files that are read for a source: itself, of an ``.idx`` also its ``.bin``, and the pair of its masks."""
    if path.suffix != ".idx":
        return [path]
    files = [path, path.with_suffix(".bin")]
    mask = mask_index(path)
    return [*files, mask, mask.with_suffix(".bin")] if mask else files


def mask_index(path: Path) -> Path | None:
    """The ``X_loss_mask.idx`` beside an ``X_input_ids.idx``; ``None`` where there is none."""
    if not path.name.endswith(f"{IDS}.idx"):
        return None
    mask = path.with_name(path.name.removesuffix(f"{IDS}.idx") + f"{MASK}.idx")
    return mask if mask.exists() else None


class TaskReader:
    """Reads one file in batches, and knows what it has read at the end.

    By the end of its name: ``.gz`` and ``.zst`` hold compressed lines, ``.parquet`` rows, ``.idx`` is the index of
    tokens (see :meth:`_tokens`); whatever else is lines. ``bytes_read`` of ``size_on_disk`` have been read so far.
    """

    def __init__(self, path: Path):
        self._path = path
        self._digest = hashlib.sha256()
        self._size = self._lines = 0

    @property
    def bytes_read(self) -> int:
        return self._size

    @property
    def size_on_disk(self) -> int:
        return sum(file.stat().st_size for file in files_on_disk(self._path))

    def batches(self, batch_bytes: int = BATCH_BYTES) -> Iterator[RecordBatch | TokenizedBatch]:
        """What is in the file, about ``batch_bytes`` at a time and never less than a line, row or document.

        Raises:
            InputError: the file is damaged or cut off; the line names it.
        """
        suffix = self._path.suffix
        if suffix == ".parquet":
            return self._rows(batch_bytes)
        if suffix == ".idx":
            return self._tokens(batch_bytes)
        if suffix == ".gz":
            return self._line_batches(self._inflated("gzip", _gzip_member, zlib.error), batch_bytes)
        if suffix == ".zst":
            import zstandard

            return self._line_batches(self._inflated("zstd", _zstd_frame, zstandard.ZstdError), batch_bytes)
        return self._line_batches(self._blocks(max(batch_bytes, 1)), batch_bytes)

    def entry(self) -> InputFile:
        """What was read, for the ledger; after the last batch."""
        return InputFile(str(self._path), self._size, self._lines, self._digest.hexdigest())

    # ------------------------------------------------------------------------------------------------------------ lines

    def _blocks(self, size: int, path: Path | None = None) -> Iterator[bytes]:
        with open(path or self._path, "rb", buffering=0) as file:
            while block := file.read(size):
                self._digest.update(block)
                self._size += len(block)
                yield block

    def _inflated(self, kind: str, start: Callable[[], Any], error_type: type[Exception]) -> Iterator[bytes]:
        """The content of a compressed file: members one after the other, the last one whole."""
        member = None
        for block in self._slices():
            while block:
                if member is None:
                    member = start()
                try:
                    content = member.decompress(block)
                except error_type as error:
                    raise InputError(f"{self._path}: damaged, or not a {kind} file ({error}); make it again") from None
                block = b""
                if member.eof:
                    # zeros after the last member are padding
                    block, member = member.unused_data.lstrip(b"\0"), None
                if content:
                    yield content
        if member is not None or self._size == 0:
            raise InputError(f"{self._path}: cut off, the {kind} data have no end; make the file again")

    def _slices(self) -> Iterator[bytes]:
        for block in self._blocks(_BLOCK):
            yield from (block[start : start + _SLICE] for start in range(0, len(block), _SLICE))

    def _line_batches(self, blocks: Iterable[bytes], batch_bytes: int) -> Iterator[RecordBatch]:
        pieces: list[bytes] = []  # what is read and not handed on
        held, ended = 0, False  # bytes in pieces, and whether a line ends in them
        for block in blocks:
            cut = block.rfind(b"\n") + 1
            ended = ended or cut > 0
            held += len(block)
            if held < batch_bytes or not ended:
                pieces.append(block)
                continue
            if not cut:  # the last line ends in an earlier block
                whole = b"".join([*pieces, block])
                cut, block, pieces = whole.rfind(b"\n") + 1, whole, []
            pieces.append(block[:cut])
            yield from self._batches_of(b"".join(pieces))
            pieces = [block[cut:]]
            held, ended = len(pieces[0]), False
        if held:
            yield from self._batches_of(b"".join(pieces))

    def _batches_of(self, content: bytes) -> Iterator[RecordBatch]:
        if self._lines == 0:
            content = content.removeprefix(_BOM)
        lines = io.BytesIO(content).readlines()  # splits at \n alone
        for start in range(0, len(lines), BATCH_RECORDS):
            yield from self._batch(lines[start : start + BATCH_RECORDS])

    def _batch(self, lines: list[Any]) -> Iterator[RecordBatch]:
        if lines:
            self._lines += len(lines)
            yield RecordBatch(str(self._path), self._lines - len(lines) + 1, lines)

    # ------------------------------------------------------------------------------------------------------------- rows

    def _rows(self, batch_bytes: int) -> Iterator[RecordBatch]:
        """Rows of a parquet file as dicts; fields that are null are left out, at any depth, and columns of times."""
        import pyarrow
        from pyarrow import parquet

        self._read_through()  # a table is not read from front to back
        damage = (pyarrow.ArrowException, OSError, ValueError, KeyError)
        try:
            table = parquet.ParquetFile(self._path, buffer_size=BATCH_BYTES)
        except damage as error:
            raise self._unreadable("damaged, or not a parquet file", error) from None
        with table:
            # no shape reads a time, and one in nanoseconds has no Python form
            schema = table.schema_arrow
            columns = [field.name for field in schema if not pyarrow.types.is_temporal(field.type)]
            columns = None if len(columns) == len(schema) else columns
            batches = table.iter_batches(_rows_of(table.metadata, batch_bytes), columns=columns, use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                    rows = [] if batch is None else batch.to_pylist(maps_as_pydicts="strict")
                except damage as error:
                    raise self._unreadable(f"cannot be read from row {self._lines + 1} on", error) from None
                if batch is None:
                    return
                yield from self._batch([_without_nulls(row) for row in rows])

    def _unreadable(self, what: str, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        return InputError(f"{self._path}: {what} ({reason}); write the file again")

    # ----------------------------------------------------------------------------------------------------------- tokens

    def _tokens(self, batch_bytes: int) -> Iterator[TokenizedBatch]:
        """The documents of an MMIDIDX index, each one sample: its sequences joined.

        An ``X_input_ids.idx`` that has an ``X_loss_mask.idx`` beside it takes its mask from there; the tokens of any
        other index all are supervised. Rows that were packed or padded when they were written stay as they are: padding
        has mask 0, and what shares a row shares a sample.
        """
        mask_path = mask_index(self._path)
        ids = _open_index(self._path)
        if not np.issubdtype(ids.items.dtype, np.integer):
            raise InputError(f"{self._path}: items of type {ids.items.dtype}; token ids are whole numbers")
        bounds = _document_bounds(ids, self._path)
        mask = None
        if mask_path is not None:
            mask = _open_index(mask_path)
            if not np.array_equal(mask.lengths, ids.lengths) or not np.array_equal(mask.documents, ids.documents):
                raise InputError(f"{mask_path}: its sequences are not those of {self._path.name}; write both again")
            _document_bounds(mask, mask_path)
        for path in files_on_disk(self._path):
            self._read_through(path)
        first, documents = 0, len(bounds) - 1
        while first < documents:
            # documents up to batch_bytes of int32, at least one
            last = int(np.searchsorted(bounds, bounds[first] + max(batch_bytes // 4, 1), "right")) - 1
            last = min(max(last, first + 1), documents)
            items = slice(int(bounds[first]), int(bounds[last]))
            batch_ids = self._ids(ids.items[items])
            batch_mask = np.ones(len(batch_ids), np.uint8) if mask is None else _mask(mask.items[items], mask_path)
            self._lines = last
            lengths = np.diff(bounds[first : last + 1]).astype(np.int32)
            yield TokenizedBatch(str(self._path), first + 1, batch_ids, batch_mask, lengths)
            first = last

    def _ids(self, items: np.ndarray) -> np.ndarray:
        if len(items) and not 0 <= int(items.min()) <= int(items.max()) < 2**31:
            raise InputError(f"{self._path}: token ids from {items.min()} to {items.max()}; they must be 0 to 2^31 - 1")
        return items.astype(np.int32)

    def _read_through(self, path: Path | None = None) -> None:
        for _ in self._blocks(BATCH_BYTES, path):
            pass


def _gzip_member() -> Any:
    return zlib.decompressobj(16 + zlib.MAX_WBITS)


def _zstd_frame() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _rows_of(metadata: Any, batch_bytes: int) -> int:
    """How many rows of a parquet file make about ``batch_bytes``."""
    size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return max(1, min(batch_bytes * metadata.num_rows // max(size, 1), 1 << 16))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _open_index(path: Path) -> IndexedDataset:
    return IndexedDataset(path.with_suffix(""))


def _document_bounds(data: IndexedDataset, path: Path) -> np.ndarray:
    """Where each document starts among the items, and their number, int64 [documents + 1]."""
    sequences = len(data)
    starts = np.zeros(sequences + 1, np.int64)
    np.cumsum(data.lengths, dtype=np.int64, out=starts[1:])
    marks = data.documents
    whole = (
        (sequences == 0 or int(data.lengths.min()) >= 0)
        and starts[-1] == len(data.items)
        and all(
            np.array_equal(data.start_of(slice(first, first + 2**20)), starts[first : min(first + 2**20, sequences)])
            for first in range(0, sequences, 2**20)
        )
        and len(marks) > 0
        and marks[0] == 0
        and marks[-1] == sequences
        and (np.diff(marks) >= 0).all()
    )
    if not whole:
        raise InputError(f"{path}: damaged, sequences or documents do not follow one after the other; write it again")
    return starts[marks]


def _mask(items: np.ndarray, path: Path) -> np.ndarray:
    mask = np.asarray(items == 1, np.uint8)
    if (mask != items).any():
        raise InputError(f"{path}: a loss mask holds 0 and 1 only")
    return mask

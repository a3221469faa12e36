"""Reading one file of a task, once and in order: lines of JSON or an array, plain or compressed, a table, or tokens.

Only one batch is in memory at a time, and of a compressed file one block; a line is never cut. The ledger's entry of
the file is complete when it has been read: bytes and sha256 are those of the file on disk.
"""

import contextlib
import decimal
import hashlib
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from mft_megatron.data.storage.ledger import InputFile
from mft_megatron.disk_errors import failure
from mft_megatron.errors import InputError
from mft_megatron.parsing.git_lfs import refuse_pointer

from .json_array import BOM, items_of_array, starts_with_array
from .record_batches import RecordBatch, TokenizedBatch
from .tokenized_file import TokenizedFile, files_on_disk

BATCH_BYTES = 1 << 20
# limits the number of objects of a batch of tiny records
BATCH_RECORDS = 1 << 12
# compressed bytes that are read at a time, and that are decompressed at a time
_READ_BYTES, _DECOMPRESSED_BYTES = 1 << 16, 1 << 12


# whether the next batch is taken
Takes: TypeAlias = Callable[[], bool]


def every_batch() -> bool:
    """Take the next batch, whichever it is."""
    return True


class _Decompressor(Protocol):
    """One member of a gzip file, or one frame of a zstd file."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


class TaskReader:
    """Reads one file in batches.

    The end of its name decides how: ``.gz`` and ``.zst`` are compressed, ``.parquet`` holds rows, ``.idx`` is the
    index of tokens (see :class:`.tokenized_file.TokenizedFile`); any other file holds lines, and ``.json`` lines or one
    array.
    """

    def __init__(self, path: Path, takes: Takes = every_batch):
        """Remember the file; it is opened when batches are read.

        Args:
            path: of the file.
            takes: called for each batch in order; those for which it is false are read and counted, but not returned.
        """
        self._path, self._takes = path, takes
        self._digest = hashlib.sha256()
        self._size = self._lines = 0

    @property
    def bytes_read(self) -> int:
        """Bytes of :attr:`size_on_disk` that have been read so far."""
        return self._size

    @property
    def size_on_disk(self) -> int:
        """Bytes of all files that are read."""
        return sum(file.stat().st_size for file in files_on_disk(self._path))

    def batches(self, batch_bytes: int = BATCH_BYTES) -> Iterator[RecordBatch | TokenizedBatch]:
        """Read the file, about ``batch_bytes`` at a time and at least one line, row or document.

        Raises:
            InputError: the file is damaged or truncated, or a pointer of Git LFS; the message names it.
        """
        for file in files_on_disk(self._path):
            if file.is_file():
                with _failure_reported(file):
                    refuse_pointer(file)
        suffix = self._path.suffix.lower()
        if suffix == ".parquet":
            return self._rows(batch_bytes)
        if suffix == ".idx":
            return self._documents(batch_bytes)
        if suffix == ".gz":
            return self._json_batches(self._decompressed("gzip", _gzip_member, zlib.error), batch_bytes)
        if suffix == ".zst":
            import zstandard

            return self._json_batches(self._decompressed("zstd", _zstd_frame, zstandard.ZstdError), batch_bytes)
        return self._json_batches(self._blocks(max(batch_bytes, 1)), batch_bytes)

    def entry(self) -> InputFile:
        """Describe the file for the ledger; call it after the last batch."""
        return InputFile(str(self._path), self._size, self._lines, self._digest.hexdigest())

    def _blocks(self, size: int, path: Path | None = None) -> Iterator[bytes]:
        """Read the file, or another one of its files, in blocks of ``size`` bytes, counted and hashed."""
        path = path or self._path
        with _failure_reported(path), open(path, "rb", buffering=0) as file:
            while block := file.read(size):
                self._digest.update(block)
                self._size += len(block)
                yield block

    def _hash_whole(self, path: Path) -> None:
        for _ in self._blocks(BATCH_BYTES, path):
            pass

    # ------------------------------------------------------------------------------------------------- lines and arrays

    def _json_batches(self, blocks: Iterator[bytes], batch_bytes: int) -> Iterator[RecordBatch]:
        if ".json" not in [suffix.lower() for suffix in self._path.suffixes[-2:]]:
            return self._line_batches(blocks, batch_bytes)
        is_array, blocks = starts_with_array(blocks)
        return self._array_batches(blocks, batch_bytes) if is_array else self._line_batches(blocks, batch_bytes)

    def _array_batches(self, blocks: Iterable[bytes], batch_bytes: int) -> Iterator[RecordBatch]:
        items: list[bytes] = []
        held = 0
        for item in items_of_array(blocks, str(self._path)):
            items.append(item)
            held += len(item)
            if held >= batch_bytes or len(items) == BATCH_RECORDS:
                yield from self._batch(items, of_array=True)
                items, held = [], 0
        yield from self._batch(items, of_array=True)

    def _decompressed(
        self, kind: str, start: Callable[[], _Decompressor], error_type: type[Exception]
    ) -> Iterator[bytes]:
        """Content of a compressed file: its members in order, of which the last must be complete."""
        member: _Decompressor | None = None
        for block in self._compressed_blocks():
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

    def _compressed_blocks(self) -> Iterator[bytes]:
        for block in self._blocks(_READ_BYTES):
            for start in range(0, len(block), _DECOMPRESSED_BYTES):
                yield block[start : start + _DECOMPRESSED_BYTES]

    def _line_batches(self, blocks: Iterable[bytes], batch_bytes: int) -> Iterator[RecordBatch]:
        unread, ended = bytearray(), False  # what is in no batch yet, and whether a line ends in it
        for block in blocks:
            start = len(unread)
            large = start >= batch_bytes and not ended  # a line that is a batch alone
            ended = ended or b"\n" in block
            unread += block
            if len(unread) < batch_bytes or not ended:
                continue
            end = (unread.find(b"\n", start) if large else unread.rfind(b"\n")) + 1
            with memoryview(unread) as view:
                content = bytes(view[:end])
            del unread[:end]
            ended = large and b"\n" in unread
            yield from self._batches_of_lines(content)
        content = bytes(unread)
        unread.clear()
        yield from self._batches_of_lines(content)

    def _batches_of_lines(self, content: bytes) -> Iterator[RecordBatch]:
        if self._lines == 0:
            content = content.removeprefix(BOM)
        if content.find(b"\n", 0, -1) < 0:  # a line may be very large, and memory holds it once
            yield from self._batch([content] if content else [])
            return
        lines = io.BytesIO(content).readlines()  # splits at \n alone
        del content
        for start in range(0, len(lines), BATCH_RECORDS):
            yield from self._batch(lines[start : start + BATCH_RECORDS])

    def _batch(self, lines: Sequence[bytes | dict[str, Any]], of_array: bool = False) -> Iterator[RecordBatch]:
        if lines:
            self._lines += len(lines)
            if not self._takes():
                return
            yield RecordBatch(str(self._path), self._lines - len(lines) + 1, list(lines), of_array)

    # ------------------------------------------------------------------------------------------------------------- rows

    def _rows(self, batch_bytes: int) -> Iterator[RecordBatch]:
        """Rows of a parquet file as dicts, without fields that are null, at any depth, and with times as text."""
        import pyarrow
        from pyarrow import parquet

        self._hash_whole(self._path)  # a table is not read from front to back
        damage = (pyarrow.ArrowException, OSError, ValueError, KeyError)
        try:
            table = parquet.ParquetFile(self._path, buffer_size=BATCH_BYTES)
        except damage as error:
            raise self._unreadable("damaged, or not a parquet file", error) from None
        with table:
            batches = table.iter_batches(_rows_of(table.metadata, batch_bytes), use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                    rows = self._taken_rows(batch)
                except damage as error:
                    raise self._unreadable(f"cannot be read from row {self._lines + 1} on", error) from None
                if batch is None:
                    return
                if rows is not None:
                    yield RecordBatch(
                        str(self._path), self._lines - len(rows) + 1, [_without_nulls(row) for row in rows]
                    )

    def _taken_rows(self, batch: Any) -> list[dict[str, Any]] | None:
        """Rows of a table of pyarrow as dicts; ``None`` if there are none, or they are not taken."""
        if batch is None or not batch.num_rows:
            return None
        rows: list[dict[str, Any]] | None = None
        if self._takes():
            rows = _with_times_as_text(batch).to_pylist(maps_as_pydicts="strict")
        self._lines += batch.num_rows
        return rows

    def _unreadable(self, what: str, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        return InputError(f"{self._path}: {what} ({reason}); write the file again")

    # ----------------------------------------------------------------------------------------------------------- tokens

    def _documents(self, batch_bytes: int) -> Iterator[TokenizedBatch]:
        tokenized = TokenizedFile(self._path)
        for path in files_on_disk(self._path):
            self._hash_whole(path)
        for batch in tokenized.batches(batch_bytes):
            self._lines += len(batch.lengths)
            if self._takes():
                yield batch


@contextlib.contextmanager
def _failure_reported(path: Path) -> Iterator[None]:
    """Turn a file that cannot be read into a one-line error, which would be one of the data set that is written."""
    try:
        yield
    except OSError as error:
        raise InputError(failure(error, path, "the file cannot be read")) from None


def _gzip_member() -> _Decompressor:
    return zlib.decompressobj(16 + zlib.MAX_WBITS)


def _zstd_frame() -> _Decompressor:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _rows_of(metadata: Any, batch_bytes: int) -> int:
    """Number of rows of a parquet file that have about ``batch_bytes``; ``metadata`` as pyarrow reads it."""
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return max(1, min(batch_bytes * metadata.num_rows // max(size, 1), 1 << 16))


def _with_times_as_text(batch: Any) -> Any:
    """Return a table of pyarrow whose times are text or numbers: one in nanoseconds has no Python type."""
    import pyarrow

    times = [index for index, field in enumerate(batch.schema) if pyarrow.types.is_temporal(field.type)]
    if not times:
        return batch
    columns = list(batch.columns)
    for index in times:
        try:
            columns[index] = columns[index].cast(pyarrow.string())
        except pyarrow.ArrowException:  # the machine does not know the time zone
            columns[index] = columns[index].cast(pyarrow.int64())
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _without_nulls(value: Any) -> Any:
    """Return a value of a table as it would stand in a line of JSON: without nulls, its decimals as numbers."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return float(value) if isinstance(value, decimal.Decimal) else value

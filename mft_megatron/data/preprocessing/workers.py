"""Encoding batches in order, in this process or in several; memory holds at most a few batches of each worker."""

import collections
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from mft_megatron import parent_process
from mft_megatron.data.tasks.record_batches import RecordBatch, TokenizedBatch
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .encoded_batch import EncodedBatch
from .encoded_cache import EncodedCache
from .encoding import Encoder, TaskEncoding
from .pretokenized import samples_of

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor


class WorkerKilledError(InputError):
    """A process that encodes batches ended without a word."""


class Workers:
    """Encodes the batches of all tasks; use it in a ``with`` statement. Batches in the cache are not encoded again."""

    # batches of each worker that are submitted before the first result is needed
    AHEAD = 3

    def __init__(self, count: int, tokenizer: Tokenizer, encodings: Mapping[str, TaskEncoding], cache: EncodedCache):
        """Prepare ``count`` workers; one works in this process.

        Args:
            count: number of processes.
            tokenizer: of the data set.
            encodings: of each task, by name.
            cache: that is read and written.
        """
        self._count = count
        self._tokenizer = tokenizer
        self._cache = cache
        tokens = f"{tokenizer.encoding_key}/{tokenizer.backend}"
        self._fingerprints = {task: f"{tokens}/{encoding.fingerprint}" for task, encoding in encodings.items()}
        self._encodings = encodings
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        # in this process also where others encode: what no worker could encode is refused here, in one line
        self._encoder = Encoder(self._tokenizer, self._encodings)
        if self._count > 1:
            import concurrent.futures  # not needed by a single process
            import multiprocessing

            tokenizer = self._tokenizer
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._count,
                multiprocessing.get_context("spawn"),
                _start_worker,
                (tokenizer.type, tokenizer.model, tokenizer.backend, dict(self._encodings)),
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, task: str, batches: Iterator[RecordBatch | TokenizedBatch]) -> Iterator[EncodedBatch]:
        """Encode batches of a task, in order.

        Raises:
            InputError: as :meth:`.Encoder.encode`.
            WorkerKilledError: a worker process was killed.
            BackendMismatch: as :meth:`.Encoder.encode`.
        """
        results: collections.deque[Callable[[], EncodedBatch]] = collections.deque()
        ahead = 0 if self._pool is None else self.AHEAD * self._count
        for batch in batches:
            results.append(self._submit(task, batch))
            if len(results) > ahead:
                yield results.popleft()()
        while results:
            yield results.popleft()()

    def _submit(self, task: str, batch: RecordBatch | TokenizedBatch) -> Callable[[], EncodedBatch]:
        """Start encoding a batch; the function that is returned waits for the result."""
        if isinstance(batch, TokenizedBatch):
            samples = samples_of(batch, self._tokenizer.vocab_size)
            return lambda: samples
        key = self._cache.key(batch, self._fingerprints[task])
        cached = self._cache.read(key, batch)
        if cached is not None:
            return lambda: cached
        if self._pool is None:
            return functools.partial(self._cached, key, batch, self._encoder.encode(task, batch))
        return functools.partial(self._finished, key, batch, self._pool.submit(_encode_in_worker, task, batch))

    def _finished(self, key: str, batch: RecordBatch, future: "Future[EncodedBatch]") -> EncodedBatch:
        from concurrent.futures import BrokenExecutor

        try:
            encoded = future.result()
        except BrokenExecutor:
            raise WorkerKilledError(
                "--workers: a worker process was killed, most likely for memory; give fewer workers"
            ) from None
        return self._cached(key, batch, encoded)

    def _cached(self, key: str, batch: RecordBatch, encoded: EncodedBatch) -> EncodedBatch:
        self._cache.write(key, batch, encoded)
        return encoded


# of this process, set when it starts
_encoder: Encoder


def _start_worker(tokenizer_type: str, tokenizer_model: str, backend: str, encodings: dict[str, TaskEncoding]) -> None:
    global _encoder
    import multiprocessing

    parent = multiprocessing.parent_process()
    parent_process.end_with_parent(None if parent is None else parent.pid)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = Encoder(load_tokenizer(tokenizer_type, tokenizer_model, backend), encodings)


def _encode_in_worker(task: str, batch: RecordBatch) -> EncodedBatch:
    return _encoder.encode(task, batch)

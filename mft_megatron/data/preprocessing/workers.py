"""Batches of records encoded in order, in this process or in several; at most a few batches a worker are in memory."""

import collections
import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator, Mapping

from mft_megatron.data.tasks.record_batches import RecordBatch, TokenizedBatch
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .encoded_cache import EncodedCache
from .encoding import EncodedBatch, Encoder, TaskEncoding
from .pretokenized import take_over


class Workers:
    """Encodes the batches of all tasks; use it in a ``with`` statement. What ``parts`` has is not encoded again."""

    AHEAD = 3

    def __init__(self, number: int, tokenizer: Tokenizer, encodings: Mapping[str, TaskEncoding], parts: EncodedCache):
        self._number = number
        self._tokenizer = tokenizer
        self._parts = parts
        self._fingerprints = {
            task: f"{tokenizer.fingerprint}/{tokenizer.backend}/{_fingerprint(encoding)}"
            for task, encoding in encodings.items()
        }
        self._encodings = encodings
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self._number > 1:
            tokenizer = self._tokenizer
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._number,
                multiprocessing.get_context("spawn"),
                _start_worker,
                (tokenizer.type, tokenizer.model, tokenizer.backend, dict(self._encodings)),
            )
        else:
            self._encoder = Encoder(self._tokenizer, self._encodings)
        return self

    def __exit__(self, *error) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, task: str, batches: Iterator[RecordBatch | TokenizedBatch]) -> Iterator[EncodedBatch]:
        """What becomes of each batch, in order.

        Raises:
            InputError: as the encoder does, or a worker process was killed.
            BackendMismatch: as the encoder does.
        """
        waiting: collections.deque = collections.deque()
        ahead = 0 if self._pool is None else self.AHEAD * self._number
        for batch in batches:
            waiting.append((batch, *self._submit(task, batch)))
            if len(waiting) > ahead:
                yield self._finished(*waiting.popleft())
        while waiting:
            yield self._finished(*waiting.popleft())

    def _submit(self, task: str, batch: RecordBatch | TokenizedBatch) -> tuple[str | None, object]:
        """The key to keep the answer under, if it is to be kept, and the answer or its future."""
        if isinstance(batch, TokenizedBatch):
            return None, take_over(batch, self._tokenizer.vocab_size)
        key = self._parts.key(batch, self._fingerprints[task])
        known = self._parts.read(key, batch)
        if known is not None:
            return None, known
        if self._pool is None:
            return key, self._encoder.encode(task, batch)
        return key, self._pool.submit(_encode_in_worker, task, batch)

    def _finished(self, batch: RecordBatch | TokenizedBatch, key: str | None, answer) -> EncodedBatch:
        if isinstance(answer, concurrent.futures.Future):
            try:
                answer = answer.result()
            except concurrent.futures.BrokenExecutor:
                raise InputError(
                    "--workers: a worker process was killed, most likely for memory; give fewer workers"
                ) from None
        if key is not None:
            self._parts.write(key, batch, answer)
        return answer


def _fingerprint(encoding: TaskEncoding) -> str:
    return f"{encoding.style.fingerprint}/{encoding.record_format}/{encoding.fim}/{encoding.add_bos}"


_encoder: Encoder | None = None


def _start_worker(tokenizer_type: str, tokenizer_model: str, backend: str, encodings: dict[str, TaskEncoding]) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(load_tokenizer(tokenizer_type, tokenizer_model, backend), encodings)


def _end_with_parent() -> None:
    """A main process that is killed cannot end its workers, and they would wait for work for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode_in_worker(task: str, batch: RecordBatch) -> EncodedBatch:
    return _encoder.encode(task, batch)

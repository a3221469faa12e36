"""Chunks of records encoded in order, in this process or in several; at most a few chunks a worker are in memory."""

import collections
import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator, Mapping

from mft_megatron.data.tasks.record_batches import Chunk, TokenChunk
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .encoded_cache import Parts
from .encoding import EncodedChunk, Encoder, TaskEncoding
from .pretokenized import take_over


class Workers:
    """Encodes the chunks of all tasks; use it in a ``with`` statement. What ``parts`` has is not encoded again."""

    AHEAD = 3

    def __init__(self, number: int, tokenizer: Tokenizer, encodings: Mapping[str, TaskEncoding], parts: Parts):
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

    def encode(self, task: str, chunks: Iterator[Chunk | TokenChunk]) -> Iterator[EncodedChunk]:
        """What becomes of each chunk, in order.

        Raises:
            InputError: as the encoder does, or a worker process was killed.
            BackendMismatch: as the encoder does.
        """
        waiting: collections.deque = collections.deque()
        ahead = 0 if self._pool is None else self.AHEAD * self._number
        for chunk in chunks:
            waiting.append((chunk, *self._submit(task, chunk)))
            if len(waiting) > ahead:
                yield self._finished(*waiting.popleft())
        while waiting:
            yield self._finished(*waiting.popleft())

    def _submit(self, task: str, chunk: Chunk | TokenChunk) -> tuple[str | None, object]:
        """The key to keep the answer under, if it is to be kept, and the answer or its future."""
        if isinstance(chunk, TokenChunk):
            return None, take_over(chunk, self._tokenizer.vocab_size)
        key = self._parts.key(chunk, self._fingerprints[task])
        known = self._parts.read(key, chunk)
        if known is not None:
            return None, known
        if self._pool is None:
            return key, self._encoder.encode(task, chunk)
        return key, self._pool.submit(_encode_in_worker, task, chunk)

    def _finished(self, chunk: Chunk | TokenChunk, key: str | None, answer) -> EncodedChunk:
        if isinstance(answer, concurrent.futures.Future):
            try:
                answer = answer.result()
            except concurrent.futures.BrokenExecutor:
                raise InputError(
                    "--workers: a worker process was killed, most likely for memory; give fewer workers"
                ) from None
        if key is not None:
            self._parts.write(key, chunk, answer)
        return answer


def _fingerprint(encoding: TaskEncoding) -> str:
    return f"{encoding.style.fingerprint}/{encoding.shape}/{encoding.fim}/{encoding.add_bos}"


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


def _encode_in_worker(task: str, chunk: Chunk) -> EncodedChunk:
    return _encoder.encode(task, chunk)

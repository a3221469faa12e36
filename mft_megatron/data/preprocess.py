"""Offline preprocessing: task files become a packed data set with its ledger.

::

    files ─► chunks ─► workers (encoding) ─► ids, masks, task ids on disk ─► splits ─► packs, counts ─► ledger

The result does not depend on the number of workers. Everything is written under temporary names; only when all of it is
on disk do the files take their places, the ledger last. A run that fails leaves an existing data set as it was.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mft_megatron.data.chat_format import ChatFormat, chat_format
from mft_megatron.data.encoding import INTENDED_DROPS, Chunk, EncodedChunk, Encoder
from mft_megatron.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from mft_megatron.data.ledger import (
    ArrayEntry,
    Ledger,
    PackEntry,
    SourceFile,
    TaskEntry,
    TokenizerEntry,
    file_sha256,
    ledger_path,
    read_ledger,
)
from mft_megatron.data.order import named_order
from mft_megatron.data.packing import SPLITS, SplitPacks, pack_split
from mft_megatron.data.sources import SourceReader
from mft_megatron.data.tokenizer import Tokenizer, load_tokenizer
from mft_megatron.errors import InputError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to make: the options of ``tools/preprocess_data.py``, parsed.

    ``split``: weights of train, valid and test. ``on_error``: "stop" at the first record that cannot be used, or "skip"
    and count it. ``progress``: called with task, bytes read and bytes in all.
    """

    tasks: dict[str, list[Path]]
    tokenizer_type: str
    tokenizer_model: str
    chat_template: str
    seq_length: int
    output_prefix: Path
    role_markers: str | None = None
    split: tuple[float, float, float] = (98.0, 2.0, 0.0)
    seed: int = 1234
    overlong: str = "drop"
    on_error: str = "stop"
    workers: int = 1
    progress: Callable[[str, int, int], None] = lambda task, done, total: None


@dataclasses.dataclass
class _TaskTally:
    samples_in: int = 0
    truncated: int = 0
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    lengths: list[np.ndarray] = dataclasses.field(default_factory=list)
    supervised: list[np.ndarray] = dataclasses.field(default_factory=list)
    sources: list[SourceFile] = dataclasses.field(default_factory=list)

    @property
    def kept(self) -> int:
        return sum(map(len, self.lengths))


def preprocess(recipe: Recipe) -> Ledger:
    """Make the data set of ``recipe`` and return its ledger.

    Raises:
        InputError: a record that cannot be used (``file:line``), a task of which nothing is left, a tokenizer or role
            marker that cannot be read.
    """
    tokenizer = load_tokenizer(recipe.tokenizer_type, recipe.tokenizer_model)
    style = chat_format(recipe.chat_template, tokenizer.end_of_text, recipe.role_markers)
    files = _Files(recipe.output_prefix)
    try:
        tallies = _encode_tasks(recipe, tokenizer, style, files)
        ledger = _pack(recipe, tokenizer, style, tallies, files)
        files.publish(ledger)
    except BaseException:
        files.discard()
        raise
    return ledger


class _Files:
    """The files of the data set under temporary names beside their final ones."""

    def __init__(self, prefix: Path):
        self._prefix = prefix
        self._ends: list[str] = []
        self._new_folders = [folder for folder in prefix.parents if not folder.exists()]
        prefix.parent.mkdir(parents=True, exist_ok=True)

    def temporary(self, end: str) -> Path:
        """Where to write the file whose name ends with ``end``."""
        self._ends.append(end)
        return self._named(end)

    def save(self, end: str, values: np.ndarray) -> None:
        with open(self.temporary(end), "wb") as file:
            np.save(file, values)

    def entries(self) -> dict[str, ArrayEntry]:
        """Size and hash of every file, after making sure that it is on disk."""
        entries = {}
        for end in self._ends:
            path = self._named(end)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            entries[end] = ArrayEntry(path.stat().st_size, file_sha256(path))
        return entries

    def publish(self, ledger: Ledger) -> None:
        """Move all files to their places, the ledger last; between, there is no data set rather than a mixed one."""
        target = ledger_path(self._prefix)
        with open(self.temporary("_dataset.json"), "w", encoding="utf-8") as file:
            file.write(ledger.to_json())
            file.flush()
            os.fsync(file.fileno())
        stale = self._files_of_the_data_set_before() - set(self._ends)
        target.unlink(missing_ok=True)
        for end in self._ends:
            os.replace(self._named(end), f"{self._prefix}{end}")
        for end in stale:
            Path(f"{self._prefix}{end}").unlink(missing_ok=True)
        folder = os.open(self._prefix.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _files_of_the_data_set_before(self) -> set[str]:
        try:
            return set(read_ledger(self._prefix).arrays)
        except InputError:
            return set()

    def discard(self) -> None:
        for end in self._ends:
            self._named(end).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: it is in use
            for folder in self._new_folders:
                folder.rmdir()

    def _named(self, end: str) -> Path:
        return self._prefix.with_name(f".{self._prefix.name}{end}.{os.getpid()}.tmp")


def _encode_tasks(recipe: Recipe, tokenizer: Tokenizer, style: ChatFormat, files: _Files) -> dict[str, _TaskTally]:
    """Write ids, masks and task ids of all tasks; what became of their records."""
    dtype = token_dtype(tokenizer.vocab_size)
    ids, mask = (
        IndexedDatasetWriter(files.temporary(f"_{name}.bin"), files.temporary(f"_{name}.idx"), kind)
        for name, kind in (("input_ids", dtype), ("loss_mask", np.dtype(np.uint8)))
    )
    tallies = {}
    with _Workers(recipe, tokenizer, style) as workers:
        for task, paths in recipe.tasks.items():
            tally = tallies[task] = _TaskTally()
            total, done = sum(path.stat().st_size for path in paths), 0
            for path in paths:
                reader = SourceReader(path)
                for chunk, encoded in workers.encode(reader.chunks()):
                    _take(encoded, tally, recipe.on_error)
                    ids.add(encoded.ids, encoded.lengths)
                    mask.add(encoded.mask, encoded.lengths)
                    done += sum(map(len, chunk.lines))
                    recipe.progress(task, done, total)
                tally.sources.append(reader.entry())
            _refuse_empty(task, tally)
    ids.finish()
    mask.finish()
    task_ids = np.repeat(np.arange(len(tallies), dtype=np.uint16), [tally.kept for tally in tallies.values()])
    files.save("_task_ids.npy", task_ids)
    return tallies


def _take(encoded: EncodedChunk, tally: _TaskTally, on_error: str) -> None:
    for drop in encoded.drops:
        if on_error == "stop" and drop.reason not in INTENDED_DROPS:
            raise InputError(
                f"{drop.path}:{drop.line}: {drop.message}; correct it, or leave such records out with --on-error skip"
            )
        tally.dropped[drop.reason] += 1
    tally.samples_in += encoded.records
    tally.truncated += encoded.truncated
    tally.lengths.append(encoded.lengths)
    tally.supervised.append(supervised_tokens(encoded.mask, encoded.lengths))


def supervised_tokens(mask: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Targets that count in each sample, int64: supervised tokens but the first, which nothing predicts.

    ``mask`` uint8 of all samples one behind the other, ``lengths`` of each, at least 1.
    """
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    if len(lengths) == 0:
        return np.empty(0, np.int64)
    return np.add.reduceat(mask.astype(np.int64), starts) - mask[starts]


def _refuse_empty(task: str, tally: _TaskTally) -> None:
    if tally.kept == 0:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(tally.dropped.items())) or "no record at all"
        paths = ", ".join(source.path for source in tally.sources)
        raise InputError(
            f"task {task} ({paths}) is empty: {tally.samples_in} records, none kept ({reasons}); correct its files, "
            "raise --seq-length, or leave the task out"
        )


def _pack(
    recipe: Recipe, tokenizer: Tokenizer, style: ChatFormat, tallies: dict[str, _TaskTally], files: _Files
) -> Ledger:
    lengths = np.concatenate([part for tally in tallies.values() for part in tally.lengths])
    supervised = np.concatenate([part for tally in tallies.values() for part in tally.supervised])
    kept = [tally.kept for tally in tallies.values()]
    task_ids = np.repeat(np.arange(len(kept), dtype=np.uint16), kept)
    split_of_sample = np.concatenate(
        [assign_splits(tally.kept, recipe.split, recipe.seed, task) for task, tally in tallies.items()]
    )
    packs = {}
    for number, name in enumerate(SPLITS):
        members = np.flatnonzero(split_of_sample == number)
        if len(members):
            packed = pack_split(members, lengths, task_ids, supervised, recipe.seq_length)
            for end, values in packed.files(name, recipe.seq_length).items():
                files.save(end, values)
            packs[name] = _pack_entry(packed, lengths, supervised, recipe.seq_length)
    return Ledger(
        tasks=[
            _task_entry(name, tally, split_of_sample[task_ids == number])
            for number, (name, tally) in enumerate(tallies.items())
        ],
        tokenizer=TokenizerEntry(
            type=tokenizer.type,
            model=tokenizer.model,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        chat_template={
            "name": style.name,
            "markers": dict(style.markers),
            "fingerprint": style.fingerprint,
            "stop_token_ids": stop_token_ids(tokenizer, style),
        },
        split={"weights": list(recipe.split), "seed": recipe.seed},
        overlong=recipe.overlong,
        packs={str(recipe.seq_length): packs},
        arrays=files.entries(),
    )


def stop_token_ids(tokenizer: Tokenizer, style: ChatFormat) -> list[int]:
    """Ids at which generation is to stop: end of text, and what ends a turn where the vocabulary has a token for it."""
    stop = tokenizer.token_id(style.stop_token)
    return [tokenizer.eos_token_id, *({stop} - {None, tokenizer.eos_token_id})]


def assign_splits(samples: int, weights: tuple[float, float, float], seed: int, task: str) -> np.ndarray:
    """Split of each sample of a task, uint8: 0 train, 1 valid, 2 test; the same for the same seed and task.

    Shares follow the weights as closely as whole samples allow. A split with a weight gets at least one sample where
    there are samples to spare, training first.
    """
    wanted = [weight > 0 for weight in weights]
    shares = np.array(weights) / sum(weights)
    sizes = np.floor(shares * samples).astype(np.int64)
    for number in np.argsort(-(shares * samples - sizes), kind="stable")[: samples - sizes.sum()]:
        sizes[number] += 1
    for number in range(len(SPLITS)):
        if wanted[number] and sizes[number] == 0 and sizes.max() > 1:
            sizes[sizes.argmax()] -= 1
            sizes[number] += 1
    split = np.empty(samples, np.uint8)
    split[named_order(f"{seed}/{task}", samples)] = np.repeat(np.arange(len(SPLITS), dtype=np.uint8), sizes)
    return split


def _pack_entry(packed: SplitPacks, lengths: np.ndarray, supervised: np.ndarray, seq_length: int) -> PackEntry:
    members, packs = packed.sample_numbers, len(packed.offsets) - 1
    tokens = int(lengths[members].sum())
    return PackEntry(packs, len(members), tokens, int(supervised[members].sum()), tokens / (packs * seq_length))


def _task_entry(name: str, tally: _TaskTally, split_of_sample: np.ndarray) -> TaskEntry:
    in_split = np.bincount(split_of_sample, minlength=len(SPLITS))
    return TaskEntry(
        name=name,
        samples_in=tally.samples_in,
        kept=tally.kept,
        truncated=tally.truncated,
        dropped=dict(sorted(tally.dropped.items())),
        tokens=int(sum(part.sum() for part in tally.lengths)),
        supervised_tokens=int(sum(part.sum() for part in tally.supervised)),
        splits=dict(zip(SPLITS, in_split.tolist(), strict=True)),
        sources=tally.sources,
    )


class _Workers:
    """Encodes chunks in order, in this process or in several; at most a few chunks a worker are in memory."""

    AHEAD = 3

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, style: ChatFormat):
        self._workers = recipe.workers
        self._pool = None
        if recipe.workers > 1:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                recipe.workers,
                multiprocessing.get_context("spawn"),
                _start_worker,
                (tokenizer.type, tokenizer.model, style, recipe.seq_length, recipe.overlong),
            )
        else:
            self._encoder = Encoder(tokenizer, style, recipe.seq_length, recipe.overlong)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *error) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, EncodedChunk]]:
        if self._pool is None:
            for chunk in chunks:
                yield chunk, self._encoder.encode(chunk)
            return
        waiting: collections.deque = collections.deque()
        for chunk in chunks:
            waiting.append((chunk, self._pool.submit(_encode_in_worker, chunk)))
            if len(waiting) >= self.AHEAD * self._workers:
                chunk, answer = waiting.popleft()
                yield chunk, _result(answer)
        while waiting:
            chunk, answer = waiting.popleft()
            yield chunk, _result(answer)


def _result(answer: concurrent.futures.Future) -> EncodedChunk:
    try:
        return answer.result()
    except concurrent.futures.BrokenExecutor:
        raise InputError("--workers: a worker process was killed, most likely for memory; give fewer workers") from None


_encoder: Encoder | None = None


def _start_worker(tokenizer_type: str, tokenizer_model: str, style: ChatFormat, seq_length: int, overlong: str) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = Encoder(load_tokenizer(tokenizer_type, tokenizer_model), style, seq_length, overlong)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    return _encoder.encode(chunk)

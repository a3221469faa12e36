"""The input of a data set as samples, task by task: read from its files and encoded."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from mft_megatron.data.records.segments import LEFT_OUT
from mft_megatron.data.storage.ledger import InputFile
from mft_megatron.data.tasks.reader import Takes, TaskReader, every_batch
from mft_megatron.data.tokenizers.backends import BackendMismatch
from mft_megatron.errors import InputError

from .encoded_batch import EncodedBatch
from .encoded_cache import EncodedCache
from .generation_prompts import GenerationPrompts
from .recipe import Prepared, Recipe
from .workers import WorkerKilledError, Workers

# encoded batches, each of at most a mebibyte of input, that are kept when a record is refused
WORTH_KEEPING = 64


class EncodedInput(Protocol):
    """The input of all tasks as samples; tasks are read in their order."""

    def batches(self, name: str) -> Iterator[EncodedBatch]:
        """Read the samples of a task, in the order of its files."""

    def sources(self, name: str) -> list[InputFile]:
        """Describe the files of a task; call it after the last batch."""

    @property
    def notes(self) -> Mapping[str, str]:
        """Lines for the user about tasks, by task; complete after the last batch."""


class ReadInput:
    """Input that is read from the files of the tasks and encoded; use it in a ``with`` statement.

    Attributes:
        reused: number of batches that had been encoded before.
    """

    def __init__(self, recipe: Recipe, prepared: Prepared, cache_folder: Path, takes: Takes = every_batch):
        """Prepare to read.

        Args:
            recipe: of the data set.
            prepared: what it names.
            cache_folder: for encoded batches, if the recipe has none; removed when all have been read.
            takes: called for each batch of the input in order; batches for which it is false are not encoded.
        """
        self._recipe, self._takes = recipe, takes
        self._cache = EncodedCache(recipe.cache_dir or cache_folder)
        self._workers = Workers(recipe.workers, prepared.tokenizer, prepared.encodings, self._cache)
        self._prompts = {
            name: GenerationPrompts(name, prepared.tokenizer, encoding) for name, encoding in prepared.encodings.items()
        }
        self._sources: dict[str, list[InputFile]] = {}

    def __enter__(self) -> "ReadInput":
        self._workers.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        """End the workers; remove the cache, unless an error leaves encoded batches that are worth going on from.

        Raises:
            InputError: the error was one; it says that they are kept.
        """
        self._workers.__exit__()
        if self._recipe.cache_dir is not None:
            return
        refused = isinstance(error, InputError)
        least = WORTH_KEEPING if refused and not isinstance(error, WorkerKilledError) else 1
        batches = 0 if kind is None or issubclass(kind, BackendMismatch) else self._cache.entries()
        if batches < least:
            self._cache.remove()
        elif isinstance(error, InputError):
            raise InputError(
                f"{error}. The same command goes on from {batches} encoded batches (to give up, remove "
                f"{self._cache.folder.parent})",
                error.always,
                error.code,
            ) from None

    @property
    def reused(self) -> int:
        """Number of batches that had been encoded before."""
        return self._cache.reused

    @property
    def notes(self) -> Mapping[str, str]:
        """Lines for the user about the prompts of tasks, by task; complete after the last batch."""
        return {name: watched.note for name, watched in self._prompts.items() if watched.note is not None}

    def batches(self, name: str) -> Iterator[EncodedBatch]:
        """Read the samples of a task, in the order of its files.

        Raises:
            InputError: a file cannot be read, or a record cannot be used and is not to be skipped.
            BackendMismatch: the tokenizer's fast backend tokenises a text otherwise than its reference.
        """
        readers = [TaskReader(file, self._takes) for file in self._recipe.tasks[name].files]
        total = sum(reader.size_on_disk for reader in readers)
        for reader in readers:
            for encoded in self._workers.encode(name, self._prompts[name].watch(reader.batches())):
                _refuse_drops(encoded, self._recipe.on_error)
                yield encoded
                self._recipe.progress(name, sum(other.bytes_read for other in readers), total)
        self._sources[name] = [reader.entry() for reader in readers]

    def sources(self, name: str) -> list[InputFile]:
        """Describe the files of a task; call it after the last batch."""
        return self._sources[name]


def _refuse_drops(encoded: EncodedBatch, on_error: str) -> None:
    drop = next((drop for drop in encoded.drops if drop.reason != LEFT_OUT), None)
    if drop is not None and on_error == "stop":
        raise InputError(f"{drop.position}: {drop.message}; correct it, or leave such records out with --on-error skip")

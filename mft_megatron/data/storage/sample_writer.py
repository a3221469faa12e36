"""Writing the stored samples of a data set: ids, masks and tasks, in whole samples, task by task."""

import collections
import dataclasses

import numpy as np

from mft_megatron.data.sample_slices import supervised_tokens
from mft_megatron.errors import InputError

from .arrays import TASK_ID_DTYPE
from .dataset_writer import DatasetWriter
from .indexed_dataset import IndexedDataset, IndexedDatasetWriter, token_dtype
from .ledger import InputFile, JsonObject, TaskEntry
from .stored_samples import StoredSamples
from .weights import WeightsWriter
from .weights_of_tasks import TokenWeights, weights_by_task

# keys that nothing reads, of a task in the ledger, and the name of the count of all others
MOST_KEYS, OTHER_KEYS = 1000, "(other keys)"
MOST_TASKS = np.iinfo(TASK_ID_DTYPE).max + 1


@dataclasses.dataclass
class TaskTally:
    """Counts of a task's records while they are read; see :class:`~.ledger.TaskEntry` for the fields.

    Attributes:
        documents: samples of ``text`` records.
        stopped: whether a token that ends a turn was supervised in any sample.
        token_weights: counts of the weights of tokens.
    """

    name: str
    encoding: JsonObject
    weight: float | None = None
    sampling: float | None = None
    overlong: str | None = None
    samples_in: int = 0
    kept: int = 0
    documents: int = 0
    filled: int = 0
    added: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    stopped: bool = False
    chats: int | None = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unread_keys: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    noted: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    sources: list[InputFile] = dataclasses.field(default_factory=list)
    examples: list[JsonObject] = dataclasses.field(default_factory=list)
    token_weights: TokenWeights = dataclasses.field(default_factory=TokenWeights)

    def entry(self, weights: JsonObject | None = None) -> TaskEntry:
        """Return the counts as an entry of the ledger; ``weights`` as there."""
        return TaskEntry(
            name=self.name,
            samples_in=self.samples_in,
            kept=self.kept,
            dropped=dict(sorted(self.dropped.items())),
            tokens=self.tokens,
            supervised_tokens=self.supervised_tokens,
            documents=self.documents == self.kept,
            filled=self.filled,
            encoding=self.encoding,
            weight=self.weight,
            sampling=self.sampling,
            overlong=self.overlong,
            sources=self.sources,
            unread_keys=_most_frequent(self.unread_keys),
            noted=dict(sorted(self.noted.items())),
            chats=self.chats,
            examples=self.examples,
            added=self.added,
            weights=weights or {},
        )


def _most_frequent(counts: collections.Counter[str]) -> dict[str, int]:
    """Sort counts by key; the rarest of very many, as where data are keys, are one count."""
    if len(counts) <= MOST_KEYS:
        return dict(sorted(counts.items()))
    # others that a merged data set has counted remain others
    first = sorted(counts.keys() - {OTHER_KEYS}, key=lambda key: (-counts[key], key))[:MOST_KEYS]
    return {key: counts[key] for key in sorted(first)} | {
        OTHER_KEYS: counts.total() - sum(counts[key] for key in first)
    }


class SampleWriter:
    """Appends samples to a data set; memory grows by a few bytes a sample, not with their tokens."""

    def __init__(self, files: DatasetWriter, vocab_size: int):
        self._files = files
        dtypes = {"input_ids": token_dtype(vocab_size), "loss_mask": np.dtype(np.uint8)}
        self._writers = [
            IndexedDatasetWriter(files.new(f"_{name}.bin"), files.new(f"_{name}.idx"), dtype)
            for name, dtype in dtypes.items()
        ]
        self._weights = WeightsWriter(files, self._writers[1])
        self._lengths: list[np.ndarray] = []
        self._supervised: list[np.ndarray] = []
        self.tasks: list[TaskTally] = []

    def begin(self, tally: TaskTally) -> None:
        """Begin a task: the samples added from now on belong to it.

        Raises:
            InputError: task ids of :data:`TASK_ID_DTYPE` are used up.
        """
        if len(self.tasks) == MOST_TASKS:
            raise InputError(f"task {tally.name}: a data set holds no more than {MOST_TASKS} tasks; merge some of them")
        self.tasks.append(tally)

    def add(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        lengths: np.ndarray,
        token_weights: np.ndarray | None = None,
        sample_weights: np.ndarray | None = None,
    ) -> None:
        """Append concatenated samples to the current task.

        Args:
            ids: int [tokens].
            mask: uint8 [tokens], 1 where a token is supervised.
            lengths: int32 [samples], tokens of each.
            token_weights: float32 [tokens], above 0 where the mask is 1; ``None`` where all are 1.
            sample_weights: float32 [samples], above 0; ``None`` where all are 1.
        """
        tally = self.tasks[-1]
        supervised = supervised_tokens(mask, lengths)
        self._weights.add(mask, lengths, supervised, token_weights, sample_weights)
        tally.token_weights = tally.token_weights.with_tokens(mask, token_weights)
        for writer, items in zip(self._writers, (ids, mask), strict=True):
            writer.add(items, lengths)
        self._lengths.append(lengths.astype(np.int32))
        self._supervised.append(supervised.astype(np.int32))
        tally.kept += len(lengths)
        tally.tokens += len(ids)
        tally.supervised_tokens += int(supervised.sum())

    def finish(self) -> StoredSamples:
        """Complete the files and describe the samples."""
        for writer in self._writers:
            writer.finish()
        weights = self._weights.finish()
        task_ids = np.repeat(np.arange(len(self.tasks), dtype=TASK_ID_DTYPE), [tally.kept for tally in self.tasks])
        self._files.save("_task_ids.npy", task_ids)
        mask = IndexedDataset(bin_path=self._writers[1].bin_path, idx_path=self._writers[1].idx_path)
        by_task = [tally.token_weights for tally in self.tasks]
        return StoredSamples(
            tasks=[
                tally.entry(of_task)
                for tally, of_task in zip(self.tasks, weights_by_task(weights, task_ids, by_task), strict=True)
            ],
            lengths=_concatenated(self._lengths, np.int32),
            supervised=_concatenated(self._supervised, np.int64),
            task_ids=task_ids,
            mask=mask,
            weights=weights,
        )

    def close(self) -> None:
        """Close the files, complete or not."""
        for writer in self._writers:
            writer.close()
        self._weights.close()


def _concatenated(parts: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype)

"""From stored samples to rows for one length: cut, split, sample, pack. No text and no tokenizer is needed.

::

    samples ─cut─► slices ─assign_splits─► train, valid, test ─uses_of_samples─► groups ─pack_split─► packs, counts
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mft_megatron.data.permutation import named_permutation
from mft_megatron.data.sample_slices import SampleSlices
from mft_megatron.data.storage.dataset_writer import DatasetWriter
from mft_megatron.data.storage.ledger import LengthEntry, PackEntry, TaskCut, TaskEntry
from mft_megatron.data.storage.stored_samples import StoredSamples
from mft_megatron.errors import InputError

from .cutting import DROPPED, KEPT, OVERLONG, TRUNCATED, WINDOWED, Cut, cut
from .packs import PADDING_MODES, SPLITS, SplitPacks, concatenate, pack_split
from .sampling import task_ratios, uses_of_samples
from .splitting import assign_splits


@dataclasses.dataclass(frozen=True)
class PackingOptions:
    """How stored samples become rows: the packing options of the commands, parsed.

    ``split``: weights of train, valid and test. ``overlong``: of :data:`.cutting.OVERLONG`; a task may have its own.
    ``packing``: "mixed" or "per-task". ``task_sampling``: ratios by the task's name; see :mod:`.packing.sampling`.
    """

    seq_length: int
    split: tuple[float, float, float] = (98.0, 2.0, 0.0)
    seed: int = 1234
    overlong: str = OVERLONG[0]
    padding_mode: str = PADDING_MODES[0]
    packing: str = "mixed"
    task_sampling: dict[str, float] = dataclasses.field(default_factory=dict)
    sampling_temperature: float | None = None
    sampling_max_epochs: float | None = None
    sampling_epochs: int = 1

    @classmethod
    def from_entry(cls, entry: LengthEntry, where: str) -> "PackingOptions":
        """As a data set was packed for one length.

        Raises:
            InputError: the ledger says something else than options; ``where`` names it.
        """
        try:
            return cls(**{**entry.options, "split": tuple(entry.options["split"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"{where}: packing options that cannot be read ({error}); preprocess again") from None


def build_packs(stored: StoredSamples, options: PackingOptions) -> tuple[dict[str, SplitPacks], LengthEntry, list[str]]:
    """Rows of every split that has samples, their entry for the ledger, and what the user should know of them.

    Raises:
        InputError: options that contradict each other or the data, or a task of which nothing is left.
    """
    check_packing_options(options, stored.tasks)
    overlong = [task.overlong or options.overlong for task in stored.tasks]
    if options.padding_mode == "concat":
        overlong = ["split"] * len(stored.tasks)  # borders do not matter: nothing is too long
    made = cut(stored.lengths, stored.supervised, stored.mask, stored.task_ids, options.seq_length, overlong)
    split_of_sample = np.concatenate(
        [assign_splits(task.kept, options.split, options.seed, task.name) for task in stored.tasks]
    )
    uses = _uses(stored, options, made, split_of_sample)
    cuts = [
        _task_cut(task, own, made, split_of_sample, uses, options)
        for task, own in zip(stored.tasks, _samples_of_tasks(stored.tasks), strict=True)
    ]
    _refuse_empty(stored.tasks, cuts, options)
    packs = {}
    for number, name in enumerate(SPLITS):
        packed = _pack(stored, options, made, split_of_sample == number, uses if name == "train" else None)
        if packed is not None:
            packs[name] = packed
    entries = {name: _pack_entry(packed, options.seq_length) for name, packed in packs.items()}
    stored_options = dataclasses.asdict(options) | {"split": list(options.split)}
    return packs, LengthEntry(stored_options, cuts, entries), _notices(stored.tasks, cuts, options)


def write_packs(stored: StoredSamples, options: PackingOptions, files: DatasetWriter) -> tuple[LengthEntry, list[str]]:
    """:func:`build_packs`, with the arrays written among ``files``; the entry, and what the user should know."""
    packs, entry, notices = build_packs(stored, options)
    for split, packed in packs.items():
        for end, values in packed.files(split, options.seq_length).items():
            files.save(end, values)
    return entry, notices


def check_packing_options(options: PackingOptions, tasks: Sequence[TaskEntry] = ()) -> None:
    """Refuse options that contradict each other or, where ``tasks`` are known, the data.

    Raises:
        InputError: the first contradiction.
    """
    if options.sampling_temperature is not None and options.task_sampling:
        raise InputError("--sampling-temperature: gives every task its ratio; leave --task-sampling out, or it")
    if options.padding_mode == "concat" and options.sampling_epochs != 1:
        raise InputError("--padding-mode concat: every token is used once; leave the sampling options out")
    sampled = options.task_sampling or options.sampling_temperature or options.sampling_max_epochs
    if options.padding_mode == "concat" and sampled:
        raise InputError("--padding-mode concat: every token is used once; leave the sampling options out")
    own = [task.name for task in tasks if task.sampling is not None and task.name not in options.task_sampling]
    if own and (options.padding_mode == "concat" or options.sampling_temperature is not None):
        option = "--padding-mode concat" if options.padding_mode == "concat" else "--sampling-temperature"
        raise InputError(f"{option}: the task file has a sampling of its own for task {own[0]}; leave one of them out")
    names = [task.name for task in tasks]
    unknown = [name for name in options.task_sampling if name not in names]
    if tasks and unknown:
        raise InputError(f"--task-sampling {unknown[0]}: no such task; there are {', '.join(names)}")
    partly = [task.name for task in tasks if not task.documents]
    if options.padding_mode == "concat" and partly:
        raise InputError(
            f"--padding-mode concat: task {partly[0]} is not of text alone, and cutting through a conversation would "
            "train on answers without their questions; use pack"
        )


def _uses(stored: StoredSamples, options: PackingOptions, made: Cut, split_of_sample: np.ndarray) -> np.ndarray:
    """How often one pass uses each sample, int64; 0 for those that are not in the training split."""
    usable = (made.outcome <= WINDOWED) & (split_of_sample == 0)
    samples_K = np.bincount(stored.task_ids[usable], minlength=len(stored.tasks))
    given = {
        number: options.task_sampling.get(task.name, task.sampling)
        for number, task in enumerate(stored.tasks)
        if task.name in options.task_sampling or task.sampling is not None
    }
    ratios = task_ratios(samples_K, given, options.sampling_temperature, options.sampling_max_epochs)
    uses = np.zeros(len(stored.lengths), np.int64)
    for number, (task, samples) in enumerate(zip(stored.tasks, _samples_of_tasks(stored.tasks), strict=True)):
        own = samples.start + np.flatnonzero(usable[samples])
        name = f"{options.seed}/{task.name}/sampling"
        uses[own] = uses_of_samples(len(own), float(ratios[number]), options.sampling_epochs, name)
    return uses


def _pack(
    stored: StoredSamples, options: PackingOptions, made: Cut, in_split: np.ndarray, uses: np.ndarray | None
) -> SplitPacks | None:
    """Rows of one split; ``None`` where it has no sample."""
    if options.padding_mode == "concat":
        return _concatenate(stored, options, in_split)
    own = in_split[made.slices.samples]
    slices, supervised = made.slices.take(own), made.supervised[own]
    tasks = stored.task_ids[slices.samples]
    copies = np.ones(len(tasks), np.int64) if uses is None else uses[slices.samples]
    groups = []
    for copy in range(int(copies.max(initial=0))):
        places = np.flatnonzero(copies > copy)
        groups += [places] if options.packing == "mixed" else [places[tasks[places] == t] for t in np.unique(tasks)]
    groups = [group for group in groups if len(group)]
    if not groups:
        return None
    return pack_split(slices, supervised, tasks, groups, options.seq_length, options.padding_mode, stored.lengths)


def _concatenate(stored: StoredSamples, options: PackingOptions, in_split: np.ndarray) -> SplitPacks | None:
    documents, tasks = [], []
    for number, (task, samples) in enumerate(zip(stored.tasks, _samples_of_tasks(stored.tasks), strict=True)):
        own = samples.start + np.flatnonzero(in_split[samples])
        if len(own):
            own = own[named_permutation(f"{options.seed}/{task.name}/concat", len(own))]
            documents.append(SampleSlices(own, np.zeros(len(own), np.int64), stored.lengths[own].astype(np.int64)))
            tasks.append(number)
    return concatenate(documents, tasks, options.seq_length, stored.lengths) if documents else None


def _samples_of_tasks(tasks: Sequence[TaskEntry]) -> list[slice]:
    """Where the samples of each task are: they are stored task by task."""
    ends = np.cumsum([task.kept for task in tasks]).tolist()
    return [slice(end - task.kept, end) for task, end in zip(tasks, ends, strict=True)]


def _task_cut(
    task: TaskEntry, own: slice, made: Cut, split_of_sample: np.ndarray, uses: np.ndarray, options: PackingOptions
) -> TaskCut:
    outcome, concat = made.outcome[own], options.padding_mode == "concat"
    kept = np.isin(outcome, (KEPT, TRUNCATED, WINDOWED)) | concat
    in_split = np.bincount(split_of_sample[own][kept], minlength=len(SPLITS))
    trained = split_of_sample[own] == 0
    times, samples = np.unique(uses[own][kept & trained], return_counts=True)
    # slices are in the order of their samples
    slices = slice(*np.searchsorted(made.slices.samples, [own.start, own.stop]))
    windows = made.outcome[made.slices.samples[slices]] == WINDOWED
    return TaskCut(
        kept=int(kept.sum()),
        tokens=task.tokens if concat else int(made.slices.lengths[slices].sum()),
        supervised_tokens=task.supervised_tokens if concat else int(made.supervised[slices].sum()),
        truncated=0 if concat else int((outcome == TRUNCATED).sum()),
        windowed=0 if concat else int((outcome == WINDOWED).sum()),
        windows=0 if concat else int(windows.sum()),
        unsupervised_windows=0 if concat else int(made.unsupervised_windows[own].sum()),
        dropped={} if concat else {name: n for code, name in DROPPED.items() if (n := int((outcome == code).sum()))},
        splits=dict(zip(SPLITS, in_split.tolist(), strict=True)),
        uses={str(time): int(n) for time, n in zip(times, samples, strict=True)},
    )


def _refuse_empty(tasks: Sequence[TaskEntry], cuts: Sequence[TaskCut], options: PackingOptions) -> None:
    for task, made in zip(tasks, cuts, strict=True):
        if made.kept == 0:
            reasons = ", ".join(f"{reason} {n}" for reason, n in made.dropped.items())
            raise InputError(
                f"task {task.name} is empty at --seq-length {options.seq_length}: {task.kept} samples, none kept "
                f"({reasons}); raise --seq-length, choose another --overlong, or leave the task out"
            )
        if options.split[0] > 0 and made.splits["train"] == 0:
            raise InputError(
                f"task {task.name}: none of its samples in the train split fits into --seq-length {options.seq_length} "
                f"({made.kept} of {task.kept} samples do); raise it, or choose another --overlong"
            )


def _notices(tasks: Sequence[TaskEntry], cuts: Sequence[TaskCut], options: PackingOptions) -> list[str]:
    """Lines for the user: splits that got nothing of a task, samples that sampling leaves out."""
    lines = []
    for task, made in zip(tasks, cuts, strict=True):
        for number, name in enumerate(SPLITS):
            if options.split[number] > 0 and made.splits[name] == 0:
                why = "too few samples" if made.kept == task.kept else "too few samples that fit"
                lines.append(f"task {task.name}: {why} to have any in the {name} split")
        if unused := made.uses.get("0", 0):
            lines.append(
                f"task {task.name}: sampling leaves out {unused:,} of {made.splits['train']:,} training samples; "
                "--sampling-epochs would use them in turn"
            )
    return lines


def _pack_entry(packed: SplitPacks, seq_length: int) -> PackEntry:
    packs, tokens = len(packed.offsets) - 1, packed.slices.num_tokens
    samples = len(packed.slices.samples)
    return PackEntry(packs, samples, tokens, int(packed.counts[2].sum()), tokens / (packs * seq_length))

"""Stored samples to packs of one length: cut, split, sample, pack. No text and no tokenizer is needed.

::

    samples ─cut_samples─► slices ─assign_splits─► train, valid, test ─uses_of_samples─► groups ─pack_split─► packs
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mft_megatron.data.permutation import named_permutation, named_seed
from mft_megatron.data.sample_slices import SampleSlices
from mft_megatron.data.storage.dataset_writer import DatasetWriter
from mft_megatron.data.storage.ledger import ORDER_VERSION, LengthEntry, PackEntry, TaskCut, TaskEntry
from mft_megatron.data.storage.stored_samples import StoredSamples
from mft_megatron.errors import InputError

from .cutting import DROPPED, TRUNCATED, WINDOWED, CutSamples, cut_samples
from .packing_options import SPLITS, PackingOptions, check_packing_options
from .packs import SplitPacks, concatenate_documents, pack_split
from .sampling import task_ratios, uses_of_samples
from .splitting import assign_splits


def build_packs(stored: StoredSamples, options: PackingOptions) -> tuple[dict[str, SplitPacks], LengthEntry, list[str]]:
    """Pack the stored samples of a data set.

    Returns:
        packs: of every split that has samples, by its name.
        entry: of this length, for the ledger.
        notices: lines that the user should read.

    Raises:
        InputError: options that contradict each other or the data, or a task of which nothing is left.
    """
    check_packing_options(options, stored.tasks)
    overlong = [task.overlong or options.overlong for task in stored.tasks]
    if options.padding_mode == "concat":
        # no sample is too long for a stream of documents
        overlong = ["split"] * len(stored.tasks)
    cut = cut_samples(
        stored.lengths, stored.supervised, stored.mask, stored.task_ids, options.seq_length, overlong, stored.weights
    )
    split_of_sample = np.concatenate(
        [assign_splits(task.kept, options.split, options.seed, task.name) for task in stored.tasks]
    )
    uses = _uses(stored, options, cut, split_of_sample)
    task_cuts = [
        _task_cut(task, samples, cut, split_of_sample, uses, options)
        for task, samples in zip(stored.tasks, _samples_of_tasks(stored.tasks), strict=True)
    ]
    _refuse_empty(stored.tasks, task_cuts, options)
    packs = {}
    for index, name in enumerate(SPLITS):
        packed = _pack(stored, options, cut, name, split_of_sample == index, uses)
        if packed is not None:
            packs[name] = packed
    entries = {name: _pack_entry(packed, options.seq_length) for name, packed in packs.items()}
    stored_options = dataclasses.asdict(options) | {"split": list(options.split)}
    entry = LengthEntry(stored_options, task_cuts, entries, ORDER_VERSION)
    return packs, entry, _notices(stored.tasks, task_cuts, options)


def write_packs(stored: StoredSamples, options: PackingOptions, files: DatasetWriter) -> tuple[LengthEntry, list[str]]:
    """Pack the stored samples of a data set and write the arrays among its ``files``.

    Returns:
        entry: of this length, for the ledger.
        notices: lines that the user should read.

    Raises:
        InputError: as :func:`build_packs`.
    """
    packs, entry, notices = build_packs(stored, options)
    for split, packed in packs.items():
        for suffix, values in packed.files(split, options.seq_length).items():
            files.save(suffix, values)
    return entry, notices


def _uses(stored: StoredSamples, options: PackingOptions, cut: CutSamples, split_of_sample: np.ndarray) -> np.ndarray:
    """Times that one pass uses each sample, int64 [samples]; 0 outside the training split."""
    usable = (cut.outcome <= WINDOWED) & (split_of_sample == 0)
    samples_K = np.bincount(stored.task_ids[usable], minlength=len(stored.tasks))
    given: dict[int, float] = {}
    for index, task in enumerate(stored.tasks):
        ratio = options.task_sampling.get(task.name, task.sampling)
        if ratio is not None:
            given[index] = ratio
    ratios = task_ratios(samples_K, given, options.sampling_temperature, options.sampling_max_epochs)
    uses = np.zeros(len(stored.lengths), np.int64)
    for index, (task, samples) in enumerate(zip(stored.tasks, _samples_of_tasks(stored.tasks), strict=True)):
        usable_samples = samples.start + np.flatnonzero(usable[samples])
        name = f"{options.seed}/{task.name}/sampling"
        uses[usable_samples] = uses_of_samples(len(usable_samples), float(ratios[index]), options.sampling_epochs, name)
    return uses


def _pack(
    stored: StoredSamples,
    options: PackingOptions,
    cut: CutSamples,
    split: str,
    in_split: np.ndarray,
    uses: np.ndarray,
) -> SplitPacks | None:
    """Pack one split; ``None`` where it has no sample.

    Args:
        in_split: bool [samples].
        uses: int64 [samples], of the training split; samples of the others are used once.
    """
    if options.padding_mode == "concat":
        return _concatenate(stored, options, in_split)
    slice_in_split = in_split[cut.slices.samples]
    slices, supervised = cut.slices.take(slice_in_split), cut.supervised[slice_in_split]
    tasks = stored.task_ids[slices.samples]
    copies = uses[slices.samples] if split == "train" else np.ones(len(tasks), np.int64)
    groups = {}
    for copy in range(int(copies.max(initial=0))):
        indices = np.flatnonzero(copies > copy)
        name = f"{options.seed}/{split}/{options.seq_length}/{copy}/packer"
        if options.packing == "mixed":
            groups[name] = indices
        else:
            for task in np.unique(tasks):
                groups[f"{name}/{stored.tasks[task].name}"] = indices[tasks[indices] == task]
    groups = {name: group for name, group in groups.items() if len(group)}
    if not groups:
        return None
    weights = None
    if stored.weights is not None and cut.weights is not None:
        of_samples = stored.weights.samples[slices.samples].astype(np.float64)
        weights = np.stack([of_samples * cut.weights[slice_in_split], of_samples * (supervised > 0)])
    mixed = options.packer == "mixed" and split == "train"
    return pack_split(
        slices,
        supervised,
        tasks,
        list(groups.values()),
        options.seq_length,
        options.padding_mode,
        stored.lengths,
        weights,
        [named_seed(name) for name in groups] if mixed else None,
    )


def _concatenate(stored: StoredSamples, options: PackingOptions, in_split: np.ndarray) -> SplitPacks | None:
    documents, tasks = [], []
    for index, (task, samples) in enumerate(zip(stored.tasks, _samples_of_tasks(stored.tasks), strict=True)):
        of_task = samples.start + np.flatnonzero(in_split[samples])
        if len(of_task):
            of_task = of_task[named_permutation(f"{options.seed}/{task.name}/concat", len(of_task))]
            starts = np.zeros(len(of_task), np.int64)
            documents.append(SampleSlices(of_task, starts, stored.lengths[of_task].astype(np.int64)))
            tasks.append(index)
    return concatenate_documents(documents, tasks, options.seq_length, stored.lengths) if documents else None


def _samples_of_tasks(tasks: Sequence[TaskEntry]) -> list[slice]:
    """Range of the samples of each task; samples are stored task by task."""
    ends = np.cumsum([task.kept for task in tasks]).tolist()
    return [slice(end - task.kept, end) for task, end in zip(tasks, ends, strict=True)]


def _task_cut(
    task: TaskEntry,
    samples: slice,
    cut: CutSamples,
    split_of_sample: np.ndarray,
    uses: np.ndarray,
    options: PackingOptions,
) -> TaskCut:
    outcome, concat = cut.outcome[samples], options.padding_mode == "concat"
    kept = (outcome <= WINDOWED) | concat
    in_split = np.bincount(split_of_sample[samples][kept], minlength=len(SPLITS))
    trained = split_of_sample[samples] == 0
    samples_by_uses = np.bincount(uses[samples][kept & trained])
    # slices are in the order of their samples
    slices = slice(*np.searchsorted(cut.slices.samples, [samples.start, samples.stop]))
    windows = cut.outcome[cut.slices.samples[slices]] == WINDOWED
    return TaskCut(
        kept=int(kept.sum()),
        tokens=task.tokens if concat else int(cut.slices.lengths[slices].sum()),
        supervised_tokens=task.supervised_tokens if concat else int(cut.supervised[slices].sum()),
        truncated=0 if concat else int((outcome == TRUNCATED).sum()),
        windowed=0 if concat else int((outcome == WINDOWED).sum()),
        windows=0 if concat else int(windows.sum()),
        unsupervised_windows=0 if concat else int(cut.unsupervised_windows[samples].sum()),
        dropped={} if concat else {name: n for code, name in DROPPED.items() if (n := int((outcome == code).sum()))},
        splits=dict(zip(SPLITS, in_split.tolist(), strict=True)),
        uses={str(times): n for times, n in enumerate(samples_by_uses.tolist()) if n},
    )


def _refuse_empty(tasks: Sequence[TaskEntry], task_cuts: Sequence[TaskCut], options: PackingOptions) -> None:
    for task, cut in zip(tasks, task_cuts, strict=True):
        if cut.kept == 0:
            reasons = ", ".join(f"{reason} {n}" for reason, n in cut.dropped.items())
            raise InputError(
                f"task {task.name} is empty at --seq-length {options.seq_length}: {task.kept} samples, none kept "
                f"({reasons}); raise --seq-length, choose another --overlong, or leave the task out"
            )
        if options.split[0] > 0 and cut.splits["train"] == 0:
            raise InputError(
                f"task {task.name}: none of its samples in the train split fits into --seq-length {options.seq_length} "
                f"({cut.kept} of {task.kept} samples do); raise it, or choose another --overlong"
            )


def _notices(tasks: Sequence[TaskEntry], task_cuts: Sequence[TaskCut], options: PackingOptions) -> list[str]:
    """Lines for the user: splits without a sample of a task, samples that sampling leaves out."""
    lines = []
    for task, cut in zip(tasks, task_cuts, strict=True):
        for weight, name in zip(options.split, SPLITS, strict=True):
            if weight > 0 and cut.splits[name] == 0:
                why = "too few samples" if cut.kept == task.kept else "too few samples that fit"
                lines.append(f"task {task.name}: {why} to have any in the {name} split")
        if unused := cut.uses.get("0", 0):
            lines.append(
                f"task {task.name}: sampling leaves out {unused:,} of {cut.splits['train']:,} training samples; "
                "--sampling-epochs would use them in turn"
            )
    return lines


def _pack_entry(packed: SplitPacks, seq_length: int) -> PackEntry:
    packs, tokens = len(packed.offsets) - 1, packed.slices.num_tokens
    samples = len(packed.slices.samples)
    return PackEntry(packs, samples, tokens, int(packed.counts[2].sum()), tokens / (packs * seq_length))

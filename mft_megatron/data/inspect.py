"""Inspecting a packed data set: samples with their mask, lengths, and a complete check."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.packing.build_packs import build_packs
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.storage.arrays import check_files
from mft_megatron.data.storage.checked_values import refuse_bad_values
from mft_megatron.data.storage.indexed_dataset import IndexedDataset
from mft_megatron.data.storage.ledger import Ledger
from mft_megatron.data.storage.stored_samples import read_stored_samples
from mft_megatron.data.storage.weights_of_tasks import count_token_weights, weights_by_task
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

# control characters other than line breaks and tabs would act on the terminal
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
# beginning and end of supervised text, with colour and without
MARKS = {True: ("\033[32m", "\033[0m"), False: ("⟦", "⟧")}


def show_samples(prefix: str, ledger: Ledger, count: int, colour: bool) -> Iterator[str]:
    """Write the first samples of each task, with supervised text in colour or in ⟦brackets⟧.

    Args:
        prefix: of the data set.
        ledger: of the data set.
        count: samples of each task.
        colour: whether to use colour.

    Raises:
        InputError: the tokenizer that the data set was made with is missing, or has changed.
    """
    if count < 1:
        return
    tokenizer = tokenizer_of(ledger, "samples cannot be shown", "use --samples 0")
    dataset = PackedDataset.open(prefix, int(next(iter(ledger.lengths))))
    for task, name in enumerate(dataset.tasks):
        first = int(np.searchsorted(dataset.task_ids, task))
        for sample in range(first, min(first + count, first + ledger.tasks[task].kept)):
            weight = 1.0 if dataset.sample_weights is None else float(dataset.sample_weights[sample])
            weighs = f", weight {weight:g}" if weight != 1 else ""
            yield f"\n── {name}, sample {sample}: {len(dataset.tokens[sample])} tokens{weighs}"
            of_tokens = (dataset.token_weights or dataset.mask)[sample]
            yield marked(tokenizer, dataset.tokens[sample], of_tokens, colour)


def tokenizer_of(ledger: Ledger, consequence: str, otherwise: str = "leave the option out") -> Tokenizer:
    """Load the tokenizer of a data set.

    Args:
        ledger: of the data set.
        consequence: of an error, for the message.
        otherwise: what to do then.

    Raises:
        InputError: it is missing, or has changed.
    """
    if not Path(ledger.tokenizer.model).exists():
        raise InputError(f"the tokenizer {ledger.tokenizer.model} is gone, so {consequence}; {otherwise}")
    tokenizer = load_tokenizer(ledger.tokenizer.type, ledger.tokenizer.model)
    if tokenizer.fingerprint != ledger.tokenizer.fingerprint:
        raise InputError(
            f"the tokenizer {ledger.tokenizer.model} is no longer the one that the data were made with, so "
            f"{consequence}; put that one back, or {otherwise}"
        )
    return tokenizer


class Decoder(Protocol):
    """The part of a tokenizer that showing text needs."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""


def marked(tokenizer: Decoder, ids: np.ndarray, weights: np.ndarray, colour: bool) -> str:
    """Write the text of a sample with marks around runs of supervised tokens, and their weight if it is not 1.

    Control characters other than line breaks and tabs are written as, for example, ``\\x1b``.

    Args:
        tokenizer: that made the ids.
        ids: int [tokens].
        weights: uint8 or float32 [tokens], 0 where a token is not supervised.
        colour: whether marks are colours or ⟦brackets⟧.
    """
    opening, closing = MARKS[colour]
    borders = [0, *(np.flatnonzero(np.diff(weights)) + 1), len(ids)]
    text = []
    for start, end in itertools.pairwise(borders):
        part = tokenizer.decode(ids[start:end].tolist()).translate(_CONTROL)
        weight = float(weights[start])
        times = f"×{weight:g}" if weight not in (0, 1) else ""
        text.append(f"{opening}{part}{closing}{times}" if weight else part)
    return "".join(text)


def show_histograms(prefix: str, ledger: Ledger) -> Iterator[str]:
    """Write the lengths of each task's samples, a bar for each power of two, and the fraction of supervised targets."""
    stored = read_stored_samples(prefix, ledger)
    for index, task in enumerate(ledger.tasks):
        in_task = stored.task_ids == index
        lengths, supervised = stored.lengths[in_task], stored.supervised[in_task]
        fraction = supervised.sum() / max(int(lengths.sum()) - len(lengths), 1)
        yield f"\n── {task.name}: {len(lengths):,} samples, {fraction:.1%} of targets supervised"
        middle, most = np.percentile(lengths, [50, 99])
        yield f"   tokens: median {middle:,.0f}, 99 % up to {most:,.0f}, longest {lengths.max():,}"
        bins = np.bincount(np.log2(lengths).astype(int))
        for power in np.flatnonzero(bins):
            bar = "█" * round(40 * bins[power] / bins.max())
            yield f"   {2**power:>9,} – {2 ** (power + 1) - 1:<9,} {bins[power]:>9,}  {bar}"


def check(prefix: str, ledger: Ledger) -> None:
    """Check every hash and value, and that packing the stored samples with the ledger's options gives its packs.

    Raises:
        InputError: something does not agree; the message names the first such thing.
    """
    check_files(prefix, ledger.arrays, hashes=True)
    refuse_bad_values(prefix, ledger)
    stored = read_stored_samples(prefix, ledger)
    lengths = IndexedDataset(f"{prefix}_input_ids").lengths
    _agree(f"{prefix}_loss_mask.idx: lengths", stored.lengths, lengths)
    of_tokens = None if stored.weights is None else stored.weights.tokens
    token_weights = count_token_weights(stored.mask, of_tokens, stored.task_ids, len(ledger.tasks))
    weights = weights_by_task(stored.weights, stored.task_ids, token_weights)
    for index, task in enumerate(ledger.tasks):
        in_task = stored.task_ids == index
        _agree(f"task {task.name}: weights", weights[index], task.weights)
        counted = (
            int(in_task.sum()),
            int(stored.lengths[in_task].sum()),
            int(stored.supervised[in_task].sum()),
        )
        expected = (task.kept, task.tokens, task.supervised_tokens)
        _agree(f"task {task.name}: samples, tokens, supervised tokens", counted, expected)
        samples = task.samples_in + task.added
        _agree(f"task {task.name}: kept and dropped", task.kept + sum(task.dropped.values()), samples)
    for length, entry in ledger.lengths.items():
        packs, counts, _ = build_packs(stored, PackingOptions.from_entry(entry, f"{prefix}_dataset.json"))
        _agree(f"{prefix}: counts at length {length}", (counts.tasks, counts.packs), (entry.tasks, entry.packs))
        for split, packed in packs.items():
            for suffix, values in packed.files(split, int(length)).items():
                _agree(f"{prefix}{suffix}: packs", np.load(f"{prefix}{suffix}", mmap_mode="r"), values)


def _agree(name: str, actual: object, expected: object) -> None:
    if isinstance(actual, np.ndarray) and isinstance(expected, np.ndarray):
        same = np.array_equal(actual, expected)
    else:
        same = actual == expected
    if not same:
        raise InputError(f"{name}: does not agree with the ledger; preprocess the data again")

"""Parts whose samples the data set has already: a merge that was interrupted while it deleted them left them behind."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mft_megatron.data.storage.arrays import check_files
from mft_megatron.data.storage.ledger import InputFile, Ledger, ledger_path, read_ledger
from mft_megatron.errors import InputError

from .part_entry import Part, PartEntry, found_parts, read_part


def merged_parts(prefix: str) -> list[Part]:
    """Find the parts of a data set if it is complete and was made from the same input with the same encodings.

    Returns:
        all its parts; none if they are still to be merged.

    Raises:
        InputError: a description is damaged, or the parts are of something else than the data set, which is newer.
    """
    found = found_parts(Path(prefix))
    if not found:
        return []
    try:
        ledger = read_ledger(prefix)
        check_files(prefix, ledger.arrays, hashes=False)
    except InputError:
        return []  # merging makes a whole one
    if all(_has_samples_of(ledger, read_part(part, file)) for part, file in found.items()):
        return list(found)
    if ledger_path(prefix).stat().st_mtime > max(file.stat().st_mtime for file in found.values()):
        raise InputError(
            f"--data-path {prefix}: beside the data set are older parts of other input, or with other options; delete "
            f"the parts to keep the data set, or delete {ledger_path(prefix).name} to merge them instead of it"
        )
    return []


def _has_samples_of(ledger: Ledger, entry: PartEntry) -> bool:
    of_ledger = [
        (task.name, task.encoding, (task.weight, task.sampling, task.overlong), _contents(task.sources))
        for task in ledger.tasks
    ]
    of_part = [
        (
            name,
            entry.encodings[name],
            tuple(task[what] for what in ("weight", "sampling", "overlong")),
            _contents(entry.sources[name]),
        )
        for name, task in entry.recipe["tasks"].items()
    ]
    return (ledger.tokenizer.encoding_key, of_ledger) == (entry.tokenizer, of_part)


def _contents(sources: Sequence[InputFile]) -> list[InputFile]:
    """Describe files without their paths, which machines may differ in."""
    return [dataclasses.replace(source, path="") for source in sources]

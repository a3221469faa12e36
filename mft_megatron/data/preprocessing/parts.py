"""Preprocessing on several machines: parts of the input, each tokenised by its own process, and their merging.

::

    batches of the input, counted over all tasks ─┬─ 1, N+1, … ─► P.part-1-of-N ─┐
                                                  ├─ 2, N+2, … ─► P.part-2-of-N ─┼─► batches in order ─► data set P
                                                  └─ …                           ┘

Every part reads all files, so that it knows their hashes and counts every batch, and encodes its own batches. Merging
puts the encoded batches into the order of the input and goes on as if they had just been encoded, so the data set is,
byte for byte, the one that one process makes.

A part has two files: ``_batches.bin``, its batches in the format of the cache, one after the other, and ``_part.json``,
which describes them and is written last.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from mft_megatron.data.packing.packing_options import PackingOptions, check_packing_options
from mft_megatron.data.storage.dataset_writer import DatasetWriter, report_full_disk, require_free_space
from mft_megatron.data.storage.ledger import InputFile, JsonObject, Ledger
from mft_megatron.data.tasks.task_files import TaskFiles
from mft_megatron.data.tokenizers.backend_names import REFERENCE
from mft_megatron.errors import InputError

from .encoded_batch import EncodedBatch
from .encoded_cache import read_encoded, write_encoded
from .part_entry import BATCHES, DESCRIPTION, Part, PartEntry, delete_parts, read_parts
from .preprocess import with_reference_if_wrong, write_data_set
from .read_input import ReadInput
from .recipe import Prepared, Recipe, bytes_needed, describe, prepare

# fields of a recipe that have no part in its result, or that the description names otherwise
_OTHER_FIELDS = ("output_prefix", "workers", "cache_dir", "progress", "tokenizer_backend")


class _Turns:
    """Counts the batches of the input and takes every N-th."""

    def __init__(self, part: Part):
        self._part = part
        self.seen = 0

    def __call__(self) -> bool:
        self.seen += 1
        return (self.seen - 1) % self._part.count == self._part.number - 1


def preprocess_part(recipe: Recipe, part: Part) -> tuple[PartEntry, list[str]]:
    """Tokenise one part of the input of ``recipe`` and write its files.

    Returns:
        entry: the description of the part.
        notices: lines that the user should read.

    Raises:
        InputError: as :func:`.preprocess.preprocess`, except for what only the whole data set shows.
    """
    return with_reference_if_wrong(recipe, lambda recipe, backend: _write_part(recipe, part, backend))


def _write_part(recipe: Recipe, part: Part, backend: str) -> tuple[PartEntry, list[str]]:
    prepared = prepare(recipe, backend)
    prefix = part.prefix(recipe.output_prefix)
    require_free_space(prefix.parent, bytes_needed(recipe, prepared) // part.count)
    turns, batches, sizes, digest = _Turns(part), {}, [], hashlib.sha256()
    with (
        report_full_disk(prefix),
        DatasetWriter(prefix) as files,
        ReadInput(recipe, prepared, files.cache_folder, turns) as encoded,
    ):
        with open(files.new(BATCHES), "wb") as file:
            for name in recipe.tasks:
                before = turns.seen
                for batch in encoded.batches(name):
                    entry = io.BytesIO()
                    write_encoded(entry, batch, 0)
                    digest.update(entry.getbuffer())
                    sizes.append(file.write(entry.getbuffer()))
                batches[name] = turns.seen - before
            file.flush()
            os.fsync(file.fileno())
        described = PartEntry(
            part=part,
            recipe=_recipe_json(recipe),
            tokenizer=prepared.tokenizer.encoding_key,
            backend=prepared.tokenizer.backend,
            encodings=_encodings(recipe, prepared),
            batches=batches,
            sources={name: encoded.sources(name) for name in recipe.tasks},
            notes=dict(encoded.notes),
            sizes=sizes,
            sha256=digest.hexdigest(),
        )
        files.publish_with(DESCRIPTION, described.to_json())
    note = prepared.tokenizer.backend_note
    return described, [*([note] if note else []), *described.notes.values()]


def _recipe_json(recipe: Recipe) -> JsonObject:
    """Write a recipe as JSON that can be read in any folder of the machine."""
    values = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(recipe)
        if field.name not in _OTHER_FIELDS
    }
    values["tokenizer_model"] = str(Path(recipe.tokenizer_model).resolve())
    values["chat_template"] = _absolute(recipe.chat_template)
    values["packing"] = dataclasses.asdict(recipe.packing)
    values["tasks"] = {
        name: dataclasses.asdict(dataclasses.replace(task, template=task.template and _absolute(task.template)))
        for name, task in recipe.tasks.items()
    }
    content: JsonObject = json.loads(json.dumps(values, default=str))
    return content


def _absolute(template: str) -> str:
    return str(Path(template).resolve()) if template.endswith(".jinja") else template


def _encodings(recipe: Recipe, prepared: Prepared) -> dict[str, JsonObject]:
    described = {name: describe(encoding, recipe) for name, encoding in prepared.encodings.items()}
    content: dict[str, JsonObject] = json.loads(json.dumps(described))
    return content


# ------------------------------------------------------------------------------------------------------------- merging


def merge_parts(prefix: str, options: PackingOptions) -> tuple[Ledger, list[str]]:
    """Make a data set from its parts, and delete them when it is complete.

    Args:
        prefix: of the data set.
        options: of packing.

    Returns:
        ledger: of the data set.
        notices: lines that the user should read.

    Raises:
        InputError: as :func:`read_parts` and :func:`.preprocess.preprocess`; the tokenizer or a chat template has
            changed since the parts were made.
    """
    parts = read_parts(prefix)
    recipe = dataclasses.replace(_recipe(parts[0], Path(prefix)), packing=options)
    check_packing_options(options)
    prepared = prepare(recipe, REFERENCE)
    made_with = prepared.tokenizer.encoding_key, _encodings(recipe, prepared)
    if made_with != (parts[0].tokenizer, parts[0].encodings):
        raise InputError(
            f"--data-path {prefix}: {recipe.tokenizer_model} or a chat template has changed since the parts were made; "
            "put it back, or run all parts again"
        )
    require_free_space(Path(prefix).parent, sum(sum(entry.sizes) for entry in parts))
    with (
        report_full_disk(Path(prefix)),
        DatasetWriter(prefix) as files,
        _PartsInput(Path(prefix), parts) as encoded,
    ):
        ledger, notices = write_data_set(recipe, prepared, encoded, files)
    delete_parts(prefix, [entry.part for entry in parts])
    return ledger, [*notices, f"{len(parts)} parts were merged, and their files deleted"]


def packing_of_parts(prefix: str) -> PackingOptions:
    """Read the packing options that the parts of a data set were made with.

    Raises:
        InputError: as :func:`read_parts`.
    """
    return _recipe(read_parts(prefix)[0], Path(prefix)).packing


def _recipe(entry: PartEntry, prefix: Path) -> Recipe:
    content = dict(entry.recipe)
    packing = content.pop("packing")
    tasks = {
        name: TaskFiles(**{**task, **{what: tuple(map(Path, task[what])) for what in ("files", "left_out")}})
        for name, task in content.pop("tasks").items()
    }
    packing = PackingOptions(**{**packing, "split": tuple(packing["split"])})
    return Recipe(output_prefix=prefix, tasks=tasks, packing=packing, **content)


class _PartsInput:
    """The batches of all parts in the order of the input; use it in a ``with`` statement."""

    def __init__(self, prefix: Path, parts: list[PartEntry]):
        self._prefix, self._parts = prefix, parts
        self._turn = 0
        self._sizes = [iter(entry.sizes) for entry in parts]
        self._digests = [hashlib.sha256() for _ in parts]
        self._files: list[BinaryIO] = []

    def __enter__(self) -> "_PartsInput":
        for entry in self._parts:
            path = self._path(entry)
            if not path.is_file() or path.stat().st_size != sum(entry.sizes):
                self.__exit__()
                raise self._damaged(entry)
            self._files.append(open(path, "rb"))
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def batches(self, name: str) -> Iterator[EncodedBatch]:
        for _ in range(self._parts[0].batches[name]):
            index = self._turn % len(self._parts)
            self._turn += 1
            content = self._files[index].read(next(self._sizes[index], 0))
            self._digests[index].update(content)
            try:
                encoded = read_encoded(io.BytesIO(content), "", 0, False)
            except Exception:
                raise self._damaged(self._parts[index]) from None
            yield encoded
        if self._turn == sum(self._parts[0].batches.values()):
            self._refuse_changed()

    @property
    def notes(self) -> Mapping[str, str]:
        return {name: note for entry in reversed(self._parts) for name, note in entry.notes.items()}

    def sources(self, name: str) -> list[InputFile]:
        return self._parts[0].sources[name]

    def _refuse_changed(self) -> None:
        """Refuse parts of which something is left, or has changed, after the last batch."""
        for entry, file, digest in zip(self._parts, self._files, self._digests, strict=True):
            if file.read(1) or digest.hexdigest() != entry.sha256:
                raise self._damaged(entry)

    def _path(self, entry: PartEntry) -> Path:
        return Path(f"{entry.part.prefix(self._prefix)}{BATCHES}")

    def _damaged(self, entry: PartEntry) -> InputError:
        return InputError(
            f"{self._path(entry)}: missing or damaged, or not the file of its description; run preprocess_data.py "
            f"--part {entry.part.number}/{entry.part.count} again"
        )

"""The description of a part of the input that was tokenised alone; :mod:`.parts` says how parts are made and merged."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mft_megatron.data.storage.ledger import InputFile, JsonObject
from mft_megatron.errors import InputError
from mft_megatron.parsing.typed_json import from_json, parse_json

from .encoded_cache import VERSION

FORMAT = "mft_megatron part of a data set"
BATCHES, DESCRIPTION = "_batches.bin", "_part.json"


@dataclasses.dataclass(frozen=True, order=True)
class Part:
    """A part of the input.

    Attributes:
        number: of the part, from 1.
        count: number of parts.
    """

    number: int
    count: int

    def prefix(self, prefix: Path) -> Path:
        """Prefix of the part's files, from that of the data set."""
        return prefix.with_name(f"{prefix.name}.part-{self.number}-of-{self.count}")


def parse_part(text: str) -> Part:
    """Parse the value of ``--part``.

    Raises:
        InputError: it is not I/N with I from 1 to N.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    part = Part(*map(int, match.groups())) if match else Part(0, 0)
    if not 1 <= part.number <= part.count:
        raise InputError(
            f"--part {text}: give I/N with I from 1 to N, for example 1/8; a job array that counts from 0 adds 1"
        )
    return part


@dataclasses.dataclass(frozen=True)
class PartEntry:
    """The description of a part.

    Attributes:
        part: which one.
        recipe: of the data set.
        tokenizer: its :attr:`~mft_megatron.data.tokenizers.tokenizer.Tokenizer.encoding_key`.
        backend: that tokenised.
        encodings: everything that decides how the records of each task become samples, by task.
        batches: number of batches of each task, in all parts.
        sources: files of each task.
        notes: lines for the user about tasks, by task.
        sizes: bytes of each batch of this part.
        sha256: of the file of batches.
    """

    part: Part
    recipe: JsonObject
    tokenizer: str
    backend: str
    encodings: dict[str, JsonObject]
    batches: dict[str, int]
    sources: dict[str, list[InputFile]]
    notes: dict[str, str]
    sizes: list[int]
    sha256: str

    def to_json(self) -> str:
        """Write the description as the text of its file."""
        content = {"format": FORMAT, "format_version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def has_parts(prefix: str | Path) -> bool:
    """Whether there are parts of the data set ``prefix``."""
    return bool(found_parts(Path(prefix)))


def found_parts(prefix: Path) -> dict[Part, Path]:
    """Find the descriptions of the parts of a data set."""
    name = re.compile(re.escape(prefix.name) + r"\.part-([0-9]+)-of-([0-9]+)" + re.escape(DESCRIPTION))
    files = os.listdir(prefix.parent) if prefix.parent.is_dir() else []
    matches = [match for file in sorted(files) if (match := name.fullmatch(file))]
    return {Part(*map(int, match.groups())): prefix.with_name(match.group()) for match in matches}


def read_parts(prefix: str | Path) -> list[PartEntry]:
    """Read the descriptions of all parts of a data set, in their order.

    Raises:
        InputError: a part is missing, damaged, of another version, or made from other input or with other options than
            the first.
    """
    found = found_parts(Path(prefix))
    counts = sorted({part.count for part in found})
    if len(counts) != 1:
        raise InputError(
            f"--data-path {prefix}: there are parts of {' and of '.join(map(str, counts))}; delete those of an earlier "
            "job"
        )
    missing = [number for number in range(1, counts[0] + 1) if Part(number, counts[0]) not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"--data-path {prefix}: part {missing[0]} of {counts[0]} is missing{more}; run preprocess_data.py --part "
            f"{missing[0]}/{counts[0]} with the options of the others, or delete parts that an earlier job left"
        )
    parts = [read_part(part, file) for part, file in sorted(found.items())]
    for other in parts[1:]:
        _refuse_different(parts[0], other, prefix)
    return parts


def delete_parts(prefix: str | Path, parts: Iterable[Part]) -> None:
    """Delete the files of parts, the descriptions last, so that an interrupted deletion can be found and finished."""
    for part in parts:
        for suffix in (BATCHES, DESCRIPTION):
            Path(f"{part.prefix(Path(prefix))}{suffix}").unlink(missing_ok=True)


def read_part(part: Part, file: Path) -> PartEntry:
    """Read the description of a part.

    Raises:
        InputError: it is damaged, of another version, or of another part.
    """
    try:
        content = parse_json(file)
        versions = content.pop("format"), content.pop("format_version")
        if versions != (FORMAT, VERSION):
            raise InputError(
                f"{file}: a part of version {versions[1]}, this program reads {VERSION}; run part "
                f"{part.number}/{part.count} again"
            )
        entry = from_json(PartEntry, content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: damaged ({error}); run part {part.number}/{part.count} again") from None
    if entry.part != part:
        raise InputError(
            f"{file}: holds part {entry.part.number} of {entry.part.count}; a file of a part was renamed, run part "
            f"{part.number}/{part.count} again"
        )
    return entry


def _refuse_different(first: PartEntry, other: PartEntry, prefix: str | Path) -> None:
    where = f"--data-path {prefix}: part {other.part.number} of {other.part.count}"
    if other.tokenizer != first.tokenizer:
        raise InputError(f"{where} was made with another tokenizer than part 1; run it again")
    recipes = _without_paths(first.recipe), _without_paths(other.recipe)
    for before, here in (recipes, (first.encodings, other.encodings)):
        if list(before.get("tasks", before)) != list(here.get("tasks", here)):
            raise InputError(f"{where} was made from other tasks than part 1, or in another order; run it again")
        difference = _difference(before, here)
        if difference is not None:
            raise InputError(f"{where} was made with {difference}; run it again with the options of part 1")
    for name, sources in first.sources.items():
        if len(sources) != len(other.sources[name]):
            raise InputError(
                f"{where} read {len(other.sources[name])} files for task {name}, and part 1 {len(sources)}; run all "
                "parts again"
            )
        for before_file, file in zip(sources, other.sources[name], strict=True):
            if dataclasses.replace(before_file, path="") != dataclasses.replace(file, path=""):
                raise InputError(
                    f"{where}: {file.path} was another file ({file.size} bytes, sha256 {file.sha256[:12]}…) than for "
                    f"part 1 ({before_file.size} bytes, {before_file.sha256[:12]}…); it changed, run all parts again"
                )
    if other.batches != first.batches:
        raise InputError(f"{where} counts other batches than part 1; run all parts with one version of the program")
    if other.backend != first.backend:
        raise InputError(
            f"{where} was tokenised by {other.backend} and part 1 by {first.backend}; run all parts with "
            "--tokenizer-backend hf or sentencepiece"
        )


def _without_paths(recipe: JsonObject) -> JsonObject:
    """Leave out where files are, which machines may differ in, and which others are beside them, as those of parts."""
    tasks = {
        name: {what: value for what, value in task.items() if what not in ("files", "left_out")}
        for name, task in recipe["tasks"].items()
    }
    return {**recipe, "tokenizer_model": "", "tasks": tasks}


def _difference(before: Any, here: Any, name: str = "") -> str | None:
    """Words about the first difference of two JSON values; ``None`` if they are equal."""
    if isinstance(before, dict) and isinstance(here, dict):
        inner = (_difference(before.get(key), here.get(key), f"{name} {key}") for key in {**before, **here})
        return next((difference for difference in inner if difference is not None), None)
    return None if before == here else f"{name.strip()} {here}, and part 1 with {before}"

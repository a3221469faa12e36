"""Comparison of the tokenizer of a folder with the one that the data of a training were made with."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mft_megatron.data.tokenizers.differences import tokenizer_difference
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .finding import Finding


def tokenizer_finding(
    folder: Path, tokenizer_type: str, fingerprint: str, originals: Sequence[Path], where: str
) -> Finding:
    """Compare the tokenizer of a folder with the one that was trained with, by its ids where the files differ.

    Args:
        folder: of the export.
        tokenizer_type: of the data set.
        fingerprint: of the data set's tokenizer.
        originals: where that tokenizer may be.
        where: checkpoint or data set that records it.
    """
    subject = "trained tokenizer"
    try:
        served = load_tokenizer(tokenizer_type, folder)
        if served.fingerprint == fingerprint:
            return Finding("ok", subject, f"that of {where}")
        trained, path = next(_opened(tokenizer_type, fingerprint, originals), (None, None))
        if trained is None:
            return Finding(
                "note",
                subject,
                f"its files are not byte by byte those of {where}, which are gone, so that ids cannot be compared; "
                "--data-path compares prompts",
            )
        found = _difference(served, trained)
    except InputError as error:
        return Finding("note", subject, f"not compared with {where}: {error}")
    if found is None:
        return Finding("ok", subject, f"another file than that of {where}, with the same ids")
    return Finding("wrong", subject, f"not that of {where}: {found}; export again, or copy the tokenizer from {path}")


def _opened(tokenizer_type: str, fingerprint: str, places: Sequence[Path]) -> Iterator[tuple[Tokenizer, Path]]:
    """Open the tokenizer wherever it still is as it was."""
    for place in places:
        try:
            found = load_tokenizer(tokenizer_type, place)
            if found.fingerprint == fingerprint:
                yield found, place
        except InputError:  # it was removed
            continue


def _difference(served: Tokenizer, trained: Tokenizer) -> str | None:
    """Name the first thing that a server encodes otherwise; ``None`` if there is nothing.

    Raises:
        InputError: a tokenizer names no end-of-text token.
    """
    lacking = sorted(trained.special_tokens.keys() - served.special_tokens.keys())
    if lacking:
        return f"the folder's has no special token {', '.join(lacking)}"
    names = "the folder", "the training"
    for what, one, other in (
        ("bos_token", served.bos_token, trained.bos_token),
        ("eos_token", served.end_of_text, trained.end_of_text),
        ("the beginning of a text", served.beginning.ids.tolist(), trained.beginning.ids.tolist()),
    ):
        if one != other:
            return f"{what} is {one} in {names[0]} and {other} in {names[1]}"
    return tokenizer_difference(served, trained, names)

"""Opening a tokenizer by its type; a new kind is a class, and a function and a line in :data:`TOKENIZERS`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .backend_names import REFERENCE

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


# each kind is imported when it is opened: options need its name alone, and a job needs one kind
def _huggingface(model: str | Path) -> "Tokenizer":
    from .huggingface_tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer(model)


def _sentencepiece(model: str | Path) -> "Tokenizer":
    from .sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(model)


TOKENIZERS: dict[str, Callable[[str | Path], "Tokenizer"]] = {
    "HuggingFaceTokenizer": _huggingface,
    "SentencePieceTokenizer": _sentencepiece,
}


def load_tokenizer(tokenizer_type: str, tokenizer_model: str | Path, backend: str = REFERENCE) -> "Tokenizer":
    """Open a tokenizer.

    Args:
        tokenizer_type: a key of :data:`TOKENIZERS`, Megatron's ``--tokenizer-type``.
        tokenizer_model: a folder or file.
        backend: that encodes texts; see :meth:`.tokenizer.Tokenizer.use_backend`.

    Raises:
        InputError: there is no such tokenizer there, or it has no such backend.
    """
    tokenizer = TOKENIZERS[tokenizer_type](tokenizer_model)
    tokenizer.use_backend(backend)
    return tokenizer

"""Opening a tokenizer by its type; a new kind is a class and a line in :data:`TOKENIZERS`."""

from pathlib import Path

from .backends import REFERENCE
from .huggingface_tokenizer import HuggingFaceTokenizer
from .sentencepiece_tokenizer import SentencePieceTokenizer
from .tokenizer import Tokenizer

TOKENIZERS: dict[str, type[HuggingFaceTokenizer] | type[SentencePieceTokenizer]] = {
    HuggingFaceTokenizer.type: HuggingFaceTokenizer,
    SentencePieceTokenizer.type: SentencePieceTokenizer,
}


def load_tokenizer(tokenizer_type: str, tokenizer_model: str | Path, backend: str = REFERENCE) -> Tokenizer:
    """Open a tokenizer.

    Args:
        tokenizer_type: a key of :data:`TOKENIZERS`, Megatron's ``--tokenizer-type``.
        tokenizer_model: a folder or file.
        backend: that encodes texts; see :meth:`Tokenizer.use_backend`.

    Raises:
        InputError: there is no such tokenizer there, or it has no such backend.
    """
    tokenizer = TOKENIZERS[tokenizer_type](tokenizer_model)
    tokenizer.use_backend(backend)
    return tokenizer

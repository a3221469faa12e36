"""gigatoken as a fast backend: which tokenizers it can read, and which texts it must not get.

- It reads byte-level BPE with the pre-tokenizers of well-known models (GPT-2, Llama 3, Qwen 2, GPT-4o, …) and BPE with
  byte fallback (Llama 2, Mistral, Gemma), as ``tokenizer.json`` or as SentencePiece model. It refuses unigram and
  WordPiece models, other pre-tokenizers (also StarCoder's and DeepSeek-Coder's) and other normalisers than NFC.
- For these, over about 6000 texts each of random Unicode, mutated code and hard cases, its ids equal the reference's,
  except under NFC and the character maps of SentencePiece: there the libraries know different versions of Unicode and
  order rare combining marks differently. So if a tokenizer normalises, texts that normalisation could change go to the
  reference.
- It ignores dropout and prefixes and suffixes of words, and splits byte-level BPE that has no split. Such tokenizers
  keep the reference.
"""

import json
import re
from typing import Any

from .backends import BackendError, FastBackend, is_backend_fault, shortened
from .json_members import members_before

# other characters never change under NFC and never combine with a neighbour, in any version of Unicode
_MAY_CHANGE = (
    "[^\0-\u02ff\u0375-\u037d\u037f-\u0383\u0388-\u0482\u048a-\u0530\u2002-\u20cf\u2100-\u2125\u2127-\u2129"
    "\u212c-\u2328\u232b-\u2adb\u2add-\u2bff\u3000-\u3029\u3030-\u3098\u309b-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7a3\ufe0e\ufe0f\uff00-\uffef\U0001f300-\U0001faff]"
)
_NOT_ASCII = "[^\0-\x7f]"


def gigatoken_of_json(content: str) -> FastBackend:
    """Open gigatoken with a ``tokenizer.json``, without its added tokens.

    Args:
        content: of the file, as the ``tokenizers`` library writes it: the model at the end, in it the vocabulary.

    Raises:
        BackendError: it is not installed or cannot read this tokenizer.
    """
    before_model = members_before(content, "model")
    if before_model is None:
        raise BackendError("its tokenizer.json has no model")
    settings, model = before_model
    before_vocabulary, _ = members_before(content, "vocab", model) or ({}, None)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if before_vocabulary.get(name):
            raise BackendError(f"it does not know {name}")
    normalises = any(part["type"] != "Replace" for part in _flat(settings.get("normalizer"), "normalizers"))
    without_added = json.dumps({**settings, "added_tokens": []})
    return _open("from_json", f'{without_added[:-1]}, "model": {content[model:]}', _MAY_CHANGE if normalises else None)


def gigatoken_of_sentencepiece(model: bytes, normalises: bool) -> FastBackend:
    """Open gigatoken with a SentencePiece model.

    Args:
        model: a serialised ``ModelProto``.
        normalises: whether it has a character map.

    Raises:
        BackendError: it is not installed or cannot read this model.
    """
    return _open("from_sentencepiece", model, _NOT_ASCII if normalises else None)


def _open(opener: str, content: str | bytes, excluded: str | None) -> FastBackend:
    try:
        import gigatoken
    except ImportError as error:
        raise BackendError(f"gigatoken cannot be imported ({error})") from None
    try:
        tokenizer = getattr(gigatoken.Tokenizer, opener)(content)
    except BaseException as error:
        if not is_backend_fault(error):
            raise
        first_line = str(error).partition("\n")[0]
        raise BackendError(f"it cannot read this tokenizer ({shortened(first_line, 120)})") from None
    return FastBackend("gigatoken", tokenizer.encode, re.compile(excluded) if excluded else None)


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """List the parts of a normaliser; ``key`` holds the parts of a sequence."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [inner for one in part[key] for inner in _flat(one, key)]
    return [part]

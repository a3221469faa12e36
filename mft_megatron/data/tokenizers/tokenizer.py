"""Tokenizers behind one small interface: Hugging Face folders and SentencePiece models.

Texts arrive in segments. A segment is cut on its own and without any token added; the ids of a sample are the ids of
its segments, one after the other, and decode to the sample's text. Many tokenizers write a space before every text they
are given; between segments that would be a space nobody wrote, so it is switched off when they are opened.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mft_megatron.errors import InputError

from .backends import (
    REFERENCE,
    BackendError,
    Checked,
    DifferenceError,
    Fast,
    gigatoken_of_json,
    gigatoken_of_sentencepiece,
)
from .large_texts import LARGE, pieces_of

_PROBE = "if x:\n\treturn  1\n"


class SpecialToken(NamedTuple):
    """A name that stands for one token in markup. ``lstrip``, ``rstrip``: the token takes the whitespace before or
    after its name with it."""

    id: int
    lstrip: bool
    rstrip: bool


class _Tokenizer:
    """What both kinds have in common: the choice of what cuts texts."""

    type: str
    reference: str  # name of the reference among the backends
    model: str
    _checked: Checked | None = None
    backend_note = ""

    @property
    def backend(self) -> str:
        """What :meth:`encode_arrays` uses: "hf", "sentencepiece" or "gigatoken"."""
        return self.reference if self._checked is None else "gigatoken"

    def use_backend(self, backend: str) -> None:
        """Choose what :meth:`encode_arrays` uses; :attr:`backend_note` says why, where there was something to choose.

        Args:
            backend: of :data:`~mft_megatron.data.tokenizers.backends.BACKENDS`, or "reference".

        Raises:
            InputError: this kind of tokenizer has no such backend, or gigatoken was asked for by name and cannot be
                used or is not equal to the reference.
        """
        self._checked, self.backend_note = None, ""
        if backend in (REFERENCE, self.reference):
            return
        if backend not in ("auto", "gigatoken"):
            raise InputError(
                f"--tokenizer-backend {backend}: cannot read a {self.type}; give auto, {self.reference} or gigatoken"
            )
        try:
            checked = Checked(self._fast(), self._encode_reference, self.special_tokens)
            checked.prove()
        except BackendError as refusal:
            if backend == "gigatoken":
                raise InputError(f"--tokenizer-backend gigatoken: {refusal}; give auto or {self.reference}") from None
            self.backend_note = f"texts are cut by {self.reference}, not by gigatoken, because {refusal}"
            return
        self._checked = checked
        self.backend_note = f"texts are cut by gigatoken, which is compared with {self.reference} on a sample of them"

    def encode_arrays(self, texts: Sequence[str], markup: bool = False) -> list[np.ndarray]:
        """Ids of each text, integer arrays, as :meth:`encode_batch`, through the chosen backend; memory does not grow
        with the length of a text, but for the ids themselves.

        Raises:
            DifferenceError: the fast backend cuts one of the texts otherwise than the reference.
        """
        encode = self._encode_reference if self._checked is None else self._checked.encode
        if max(map(len, texts), default=0) <= LARGE:
            return encode(texts, markup)
        pieces, owners = [], []
        for number, text in enumerate(texts):
            for piece in pieces_of(text, lambda parts: self.encode_batch(parts, markup)):
                pieces.append(piece)
                owners.append(number)
        try:
            cut = encode(pieces, markup)
        except DifferenceError as difference:
            difference.position = owners[difference.position]
            raise
        starts = np.searchsorted(owners, range(len(texts) + 1))
        return [np.concatenate(cut[start:end]) for start, end in itertools.pairwise(starts)]

    def _encode_reference(self, texts: Sequence[str], markup: bool) -> list[np.ndarray]:
        ids: list[np.ndarray] = []
        start = characters = 0
        for end, text in enumerate(texts, 1):  # a few at a time: it needs much memory for each text until it is done
            characters += len(text)
            if characters > LARGE or end == len(texts):
                ids += [np.array(own, np.int32) for own in self.encode_batch(texts[start:end], markup)]
                start, characters = end, 0
        return ids


class HuggingFaceTokenizer(_Tokenizer):
    """A folder with ``tokenizer.json``, through the ``tokenizers`` library alone: opening takes no transformers."""

    type = "HuggingFaceTokenizer"
    reference = "hf"

    def __init__(self, model: str | Path):
        """
        Raises:
            InputError: no ``tokenizer.json``, or it or the files beside it cannot be read, or no end-of-text token.
        """
        import tokenizers

        self.model = str(Path(model).resolve())
        folder = Path(model)
        file = folder / "tokenizer.json" if folder.is_dir() else folder
        if not file.is_file():
            raise InputError(f"--tokenizer-model {model}: no tokenizer.json there; give a Hugging Face folder")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(_without_leading_space(file.read_text(encoding="utf-8")))
        except Exception as error:
            raise InputError(f"{file}: not a tokenizer ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._beside = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (file.parent / name).is_file():
                self._beside.update(_read_json(file.parent / name))
        self._file = file

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, added tokens counted in: ``len(tokenizer)`` of transformers."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The Jinja template that comes with the tokenizer, ``None`` where there is none."""
        return _chat_template(self._file.parent)

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, SpecialToken]:
        """The added tokens by name."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: SpecialToken(number, token.lstrip, token.rstrip) for number, token in added}

    @property
    def bos_token(self) -> str | None:
        number = self.bos_token_id
        return None if number is None else self._tokenizer.id_to_token(number)

    @property
    def bos_token_id(self) -> int | None:
        return self._special("bos_token")

    @functools.cached_property
    def eos_token_id(self) -> int:
        number = self._special("eos_token")
        if number is None:
            raise InputError(
                f"{self._file.parent}/tokenizer_config.json: names no eos_token; add the end-of-text token"
            )
        return number

    @property
    def pad_token_id(self) -> int:
        """The end-of-text token where there is none."""
        number = self._special("pad_token")
        return self.eos_token_id if number is None else number

    @property
    def end_of_text(self) -> str:
        return self._tokenizer.id_to_token(self.eos_token_id)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides ids: ``tokenizer.json`` and the special tokens; not of paths."""
        digest = hashlib.sha256(self._file.read_bytes())
        names = ("bos_token", "eos_token", "pad_token")
        digest.update(json.dumps([self._special(name) for name in names]).encode())
        return digest.hexdigest()

    def token_id(self, token: str) -> int | None:
        """Id of a token of the vocabulary by its name, ``None`` where there is none."""
        return self._tokenizer.token_to_id(token)

    def encode_batch(self, texts: Sequence[str], markup: bool = False) -> list[list[int]]:
        """Ids of each text, nothing added. Names of special tokens stand for those tokens only in ``markup``."""
        self._tokenizer.encode_special_tokens = not markup
        # encode_batch_fast leaves out the offsets, and is the slower one of the two
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def _fast(self) -> Fast:
        return gigatoken_of_json(self._tokenizer.to_str())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens by name."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _special(self, name: str) -> int | None:
        token = self._beside.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return self._tokenizer.token_to_id(token) if token else None


class SentencePieceTokenizer(_Tokenizer):
    """A SentencePiece ``.model`` file. Runs of spaces are kept, as code needs them, whatever the model says."""

    type = "SentencePieceTokenizer"
    reference = "sentencepiece"

    def __init__(self, model: str | Path):
        """
        Raises:
            InputError: the file is missing, cannot be read, or has no end-of-text id.
        """
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        self.model = str(Path(model).resolve())
        path = Path(model)
        file = path / "tokenizer.model" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"--tokenizer-model {model}: no such file; give a SentencePiece .model")
        self._file = file
        content = sentencepiece_model_pb2.ModelProto()
        try:
            content.ParseFromString(file.read_bytes())
            content.normalizer_spec.add_dummy_prefix = False
            content.normalizer_spec.remove_extra_whitespaces = False
            self._content = content.SerializeToString(), bool(content.normalizer_spec.precompiled_charsmap)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._content[0])
        except Exception as error:
            raise InputError(f"{file}: not a SentencePiece model ({error})") from None
        if self._processor.eos_id() < 0:
            raise InputError(f"{file}: has no end-of-text id; train it with one")
        if self.decode(self._processor.encode(_PROBE)) != _PROBE:
            raise InputError(
                f"{file}: loses line breaks, tabs or spaces, which code needs (its normalisation is "
                f"{content.normalizer_spec.name or 'unnamed'}); train it with normalization_rule_name=identity and "
                "byte_fallback"
            )
        control = [number for number in range(self.vocab_size) if self._processor.is_control(number)]
        self._control = {self._processor.id_to_piece(number): number for number in control}
        self._control_names = re.compile("|".join(map(re.escape, sorted(self._control, key=len, reverse=True))))

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The Jinja template beside the model, ``None`` where there is none."""
        return _chat_template(self._file.parent)

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, SpecialToken]:
        """The control tokens by name."""
        return {name: SpecialToken(number, False, False) for name, number in self._control.items()}

    @property
    def bos_token(self) -> str | None:
        number = self.bos_token_id
        return None if number is None else self._processor.id_to_piece(number)

    @property
    def bos_token_id(self) -> int | None:
        number = self._processor.bos_id()
        return number if number >= 0 else None

    @property
    def eos_token_id(self) -> int:
        return self._processor.eos_id()

    @property
    def pad_token_id(self) -> int:
        number = self._processor.pad_id()
        return number if number >= 0 else self.eos_token_id

    @property
    def end_of_text(self) -> str:
        return self._processor.id_to_piece(self.eos_token_id)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model file."""
        return hashlib.sha256(self._file.read_bytes()).hexdigest()

    def token_id(self, token: str) -> int | None:
        number = self._processor.piece_to_id(token)
        known = number != self._processor.unk_id() or token == self._processor.id_to_piece(number)
        return number if known else None

    def encode_batch(self, texts: Sequence[str], markup: bool = False) -> list[list[int]]:
        """Ids of each text, nothing added. Names of control tokens stand for those tokens only in ``markup``."""
        return [self._encode_markup(text) for text in texts] if markup else self._processor.encode(list(texts))

    def _fast(self) -> Fast:
        return gigatoken_of_sentencepiece(*self._content)

    def _encode_markup(self, text: str) -> list[int]:
        ids, start = [], 0
        for name in self._control_names.finditer(text):
            ids += [*self._processor.encode(text[start : name.start()]), self._control[name.group()]]
            start = name.end()
        return ids + self._processor.encode(text[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, control tokens by name."""
        text, run = [], []
        for number in map(int, ids):
            if self._processor.is_control(number):
                text += [self._processor.decode(run), self._processor.id_to_piece(number)]
                run = []
            else:
                run.append(number)
        return "".join([*text, self._processor.decode(run)])


TOKENIZERS = {kind.type: kind for kind in (HuggingFaceTokenizer, SentencePieceTokenizer)}
Tokenizer = HuggingFaceTokenizer | SentencePieceTokenizer


def load_tokenizer(tokenizer_type: str, tokenizer_model: str | Path, backend: str = REFERENCE) -> Tokenizer:
    """Open a tokenizer.

    Args:
        tokenizer_type: a key of :data:`TOKENIZERS`, Megatron's ``--tokenizer-type``.
        tokenizer_model: a folder or file.
        backend: what cuts texts, see :meth:`HuggingFaceTokenizer.use_backend`.

    Raises:
        InputError: there is no such tokenizer there, or it has no such backend.
    """
    tokenizer = TOKENIZERS[tokenizer_type](tokenizer_model)
    tokenizer.use_backend(backend)
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a JSON object")
    return content


def _chat_template(folder: Path) -> str | None:
    """The template of a folder: ``chat_template.jinja``, else that of ``tokenizer_config.json``, there alone or as
    "default" of several by name.

    Raises:
        InputError: a file that cannot be read, or a template that is no text.
    """
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if alone.is_file():
        try:
            return alone.read_text(encoding="utf-8")
        except ValueError as error:
            raise InputError(f"{alone}: not UTF-8 ({error})") from None
    template = _read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{config}: chat_template is no text; put the template into {alone.name} beside it")
    return template


def _without_leading_space(content: str) -> str:
    """A ``tokenizer.json`` that writes no space before a text, and takes none away when it decodes."""
    parts = json.loads(content)
    changed = {name: _plain(parts.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder")}
    if all(parts.get(name) == part for name, part in changed.items()):
        return content
    return json.dumps({**parts, **changed})


def _plain(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer, pre-tokenizer or decoder without its handling of a leading space."""
    if part is None or part["type"] == "Prepend" or (part["type"] == "Strip" and part.get("content") == " "):
        return None
    if part["type"] == "Sequence":
        (name,) = part.keys() - {"type"}
        return {**part, name: [plain for inner in part[name] if (plain := _plain(inner)) is not None]}
    if part["type"] == "Metaspace":
        kept = {name: value for name, value in part.items() if name != "add_prefix_space"}
        return {**kept, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    return part

"""Tokenizers of Hugging Face folders."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mft_megatron.errors import InputError
from mft_megatron.parsing.git_lfs import refuse_pointer
from mft_megatron.parsing.json_files import read_json_object

from .backends import FastBackend
from .beginnings import never, space_rule
from .gigatoken_backend import gigatoken_of_json
from .missing_files import JSON, remedy_for, without_json
from .tokenizer import SpecialToken, Tokenizer
from .tokenizer_files import read_chat_template
from .tokenizer_json import LLAMA_CLASSES, TokenizerJson, class_name


class HuggingFaceTokenizer(Tokenizer):
    """A folder with ``tokenizer.json``, opened with the ``tokenizers`` library alone; transformers is not imported."""

    type = "HuggingFaceTokenizer"
    reference = "hf"

    def __init__(self, model: str | Path):
        """Open a folder, or the ``tokenizer.json`` in it.

        Raises:
            InputError: there is no ``tokenizer.json``, or it or a file beside it cannot be read.
        """
        import tokenizers

        self.model = str(Path(model).resolve())
        folder = Path(model)
        file = folder / JSON if folder.is_dir() else folder
        if not file.is_file():
            raise InputError(f"--tokenizer-model {model}: {without_json(folder)}")
        refuse_pointer(file)
        try:
            content = TokenizerJson.read(file)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.without_leading_space().text())
        except Exception as error:
            raise InputError(f"{file}: not a tokenizer ({error}){remedy_for(file, self.type)}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (file.parent / name).is_file():
                self._config.update(read_json_object(file.parent / name))
        self._file, self._settings = file, content.without_model()

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, including added tokens: ``len(tokenizer)`` in transformers."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def chat_template(self) -> str | None:
        """Jinja template that comes with the tokenizer; ``None`` if there is none."""
        return read_chat_template(self._file.parent)

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, SpecialToken]:
        """The added tokens by name."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: SpecialToken(token_id, token.lstrip, token.rstrip) for token_id, token in added}

    @property
    def bos_token(self) -> str | None:
        """Name of the token that begins a text; ``None`` if there is none."""
        token_id = self.bos_token_id
        return None if token_id is None else self._tokenizer.id_to_token(token_id)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text; ``None`` if there is none."""
        return self._configured("bos_token")

    @functools.cached_property
    def eos_token_id(self) -> int:
        """Id of the end-of-text token.

        Raises:
            InputError: the folder names none.
        """
        token_id = self._configured("eos_token")
        if token_id is None:
            raise InputError(
                f"{self._file.parent}/tokenizer_config.json: names no eos_token; add the end-of-text token"
            )
        return token_id

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token; that of the end-of-text token if there is none."""
        token_id = self._configured("pad_token")
        return self.eos_token_id if token_id is None else token_id

    @property
    def end_of_text(self) -> str:
        """Name of the end-of-text token."""
        return cast(str, self._tokenizer.id_to_token(self.eos_token_id))  # an id that came from a name has one

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over ``tokenizer.json`` and the ids of the special tokens."""
        digest = hashlib.sha256(self._file.read_bytes())
        names = ("bos_token", "eos_token", "pad_token")
        digest.update(json.dumps([self._configured(name) for name in names]).encode())
        return digest.hexdigest()

    def token_id(self, token: str) -> int | None:
        """Id of a token by its name; ``None`` if the vocabulary does not have it."""
        return self._tokenizer.token_to_id(token)

    def encode_batch(self, texts: Sequence[str], markup: bool = False) -> list[list[int]]:
        """Encode texts; in ``markup``, names of added tokens become those tokens."""
        self._tokenizer.encode_special_tokens = not markup
        # without offsets, whose computation takes half of the time for a large text
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, in which added tokens are written by name."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    @property
    def beginning_key(self) -> str:
        """Text of everything besides :attr:`fingerprint` that decides :attr:`beginning`."""
        name = class_name(self._config)
        if name not in LLAMA_CLASSES:
            return repr([])
        return repr([name, bool(self._config.get("legacy")), self._config.get("add_prefix_space") is False])

    @functools.cached_property
    def _own(self) -> Any:
        """The tokenizer as transformers opens it, which may write a space before texts; a ``tokenizers.Tokenizer``."""
        import tokenizers

        if self._settings.as_transformers(self._config).encodes_like(self._settings.without_leading_space()):
            return self._tokenizer
        own = TokenizerJson.read(self._file).as_transformers(self._config)
        opened = tokenizers.Tokenizer.from_str(own.text())
        opened.no_truncation()
        opened.no_padding()
        return opened

    def _ids_before_texts(self) -> list[int]:
        if class_name(self._config) == "CodeLlamaTokenizer":  # adds it whatever the file says
            return [] if self.bos_token_id is None else [self.bos_token_id]
        with_tokens, without = (self._tokenizer.encode("a", add_special_tokens=added).ids for added in (True, False))
        starts = range(len(with_tokens) - len(without) + 1)
        return with_tokens[: next(start for start in starts if with_tokens[start : start + len(without)] == without)]

    def _space_before_texts(self) -> Callable[[str], bool] | None:
        return never if self._own is self._tokenizer else space_rule(self._encode_own, self.encode_batch)

    def _encode_own(self, texts: Sequence[str], markup: bool) -> list[list[int]]:
        self._own.encode_special_tokens = not markup
        return [encoding.ids for encoding in self._own.encode_batch(list(texts), add_special_tokens=False)]

    def _open_fast(self) -> FastBackend:
        return gigatoken_of_json(self._tokenizer.to_str())

    def _configured(self, name: str) -> int | None:
        """Id of the token that the files beside ``tokenizer.json`` give as, for example, "eos_token"."""
        token = self._config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        try:
            return self._tokenizer.token_to_id(token) if token else None
        except (TypeError, UnicodeEncodeError):  # no text, or one that cannot be a token
            raise InputError(
                f"{self._file.parent}: {name} is {token!r}, not a token; download the tokenizer again"
            ) from None

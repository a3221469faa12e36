"""Tokenizers of SentencePiece models."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft_megatron.errors import InputError
from mft_megatron.parsing.git_lfs import refuse_pointer
from mft_megatron.parsing.json_files import read_json_object

from .backends import FastBackend
from .beginnings import always, never, unless_space
from .gigatoken_backend import gigatoken_of_sentencepiece
from .missing_files import SENTENCEPIECE, remedy_for, without_model
from .tokenizer import SpecialToken, Tokenizer
from .tokenizer_files import read_chat_template
from .tokenizer_json import LLAMA_CLASSES, class_name

_PROBE = "if x:\n\treturn  1\n"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file. Runs of spaces are kept, as code needs them, even if the model merges them."""

    type = "SentencePieceTokenizer"
    reference = "sentencepiece"

    def __init__(self, model: str | Path):
        """Open a model, or the folder that holds it as ``tokenizer.model``.

        Raises:
            InputError: the file is missing, cannot be read, has no end-of-text id or loses whitespace.
        """
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        self.model = str(Path(model).resolve())
        path = Path(model)
        file = path / SENTENCEPIECE if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"--tokenizer-model {model}: {without_model(path)}")
        refuse_pointer(file)
        self._file = file
        content = sentencepiece_model_pb2.ModelProto()
        try:
            content.ParseFromString(file.read_bytes())
            self._writes_space = content.normalizer_spec.add_dummy_prefix
            content.normalizer_spec.add_dummy_prefix = False
            content.normalizer_spec.remove_extra_whitespaces = False
            self._model_proto: bytes = content.SerializeToString()
            self._normalises = bool(content.normalizer_spec.precompiled_charsmap)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model_proto)
        except Exception as error:
            raise InputError(f"{file}: not a SentencePiece model ({error}){remedy_for(file, self.type)}") from None
        if self._processor.eos_id() < 0:
            raise InputError(f"{file}: has no end-of-text id; train it with one")
        if self.decode(self._processor.encode(_PROBE)) != _PROBE:
            raise InputError(
                f"{file}: loses line breaks, tabs or spaces, which code needs (its normalisation is "
                f"{content.normalizer_spec.name or 'unnamed'}); train it with normalization_rule_name=identity and "
                "byte_fallback"
            )
        control = [token_id for token_id in range(self.vocab_size) if self._processor.is_control(token_id)]
        self._control = {self._processor.id_to_piece(token_id): token_id for token_id in control}
        names = "|".join(map(re.escape, sorted(self._control, key=len, reverse=True))) or "(?!)"
        self._control_names, self._named_parts = re.compile(names), re.compile(f"({names})")

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._processor.vocab_size()

    @functools.cached_property
    def chat_template(self) -> str | None:
        """Jinja template beside the model; ``None`` if there is none."""
        return read_chat_template(self._file.parent)

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, SpecialToken]:
        """The control tokens by name."""
        return {name: SpecialToken(token_id, False, False) for name, token_id in self._control.items()}

    @property
    def bos_token(self) -> str | None:
        """Name of the token that begins a text; ``None`` if there is none."""
        token_id = self.bos_token_id
        return None if token_id is None else self._processor.id_to_piece(token_id)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text; ``None`` if there is none."""
        token_id = self._processor.bos_id()
        return token_id if token_id >= 0 else None

    @property
    def eos_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self._processor.eos_id()

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token; that of the end-of-text token if there is none."""
        token_id = self._processor.pad_id()
        return token_id if token_id >= 0 else self.eos_token_id

    @property
    def end_of_text(self) -> str:
        """Name of the end-of-text token."""
        return self._processor.id_to_piece(self.eos_token_id)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model file."""
        return hashlib.sha256(self._file.read_bytes()).hexdigest()

    def token_id(self, token: str) -> int | None:
        """Id of a token by its name; ``None`` if the vocabulary does not have it."""
        token_id = self._processor.piece_to_id(token)
        known = token_id != self._processor.unk_id() or token == self._processor.id_to_piece(token_id)
        return token_id if known else None

    def encode_batch(self, texts: Sequence[str], markup: bool = False) -> list[list[int]]:
        """Encode texts; in ``markup``, names of control tokens become those tokens."""
        return [self._encode_markup(text) for text in texts] if markup else self._processor.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, in which control tokens are written by name."""
        text: list[str] = []
        run: list[int] = []
        for token_id in map(int, ids):
            if self._processor.is_control(token_id):
                text += [self._processor.decode(run), self._processor.id_to_piece(token_id)]
                run = []
            else:
                run.append(token_id)
        return "".join([*text, self._processor.decode(run)])

    @property
    def beginning_key(self) -> str:
        """Text of everything besides :attr:`fingerprint` that decides :attr:`beginning`."""
        llama = self._class_name if self._class_name in LLAMA_CLASSES else ""
        never_space = self._config.get("add_prefix_space") is False
        rules = [llama, bool(self._config.get("legacy")), never_space] if llama else []
        return repr([*rules, bool(self._ids_before_texts())])

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        """Content of the ``tokenizer_config.json`` beside the model, by which transformers opens it; empty without."""
        file = self._file.parent / "tokenizer_config.json"
        return read_json_object(file) if file.is_file() else {}

    @property
    def _class_name(self) -> str:
        return class_name(self._config)

    def _ids_before_texts(self) -> list[int]:
        added = self._config.get("add_bos_token", self._class_name == "CodeLlamaTokenizer")
        return [self.bos_token_id] if added and self.bos_token_id is not None else []

    def _space_before_texts(self) -> Callable[[str], bool]:
        if self._class_name not in LLAMA_CLASSES:
            return always if self._writes_space else never
        return never if self._config.get("add_prefix_space") is False else unless_space

    def _encode_own(self, texts: Sequence[str], markup: bool) -> list[list[int]]:
        space = self._space_before_texts()
        every = self._class_name == "LlamaTokenizer" and bool(self._config.get("legacy"))  # also after each token

        def begun(text: str) -> str:
            parts = self._named_parts.split(text) if markup else [text]
            for index in range(0, len(parts) if every else 1, 2):
                part = parts[index]
                parts[index] = f" {part}" if part and space(part[0]) else part
            return "".join(parts)

        return self.encode_batch([begun(text) for text in texts], markup)

    def _open_fast(self) -> FastBackend:
        return gigatoken_of_sentencepiece(self._model_proto, self._normalises)

    def _encode_markup(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for name in self._control_names.finditer(text):
            ids += [*self._processor.encode(text[start : name.start()]), self._control[name.group()]]
            start = name.end()
        return ids + self._processor.encode(text[start:])

"""The content of a ``tokenizer.json``: its settings, of which some write a space before a text, and its vocabulary."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .json_members import members_before

# settings that decide how a text is encoded or decoded, besides the model
_DECIDING = ("normalizer", "pre_tokenizer", "decoder")

# transformers' classes that write the space before a text in their own way
LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")


@dataclasses.dataclass(frozen=True)
class TokenizerJson:
    """The content of a ``tokenizer.json``.

    Attributes:
        settings: its small members.
        end: the rest of its text, which is not parsed: the model, with the vocabulary.
    """

    settings: Mapping[str, Any]
    end: str

    @classmethod
    def read(cls, file: Path) -> "TokenizerJson":
        """Read a file.

        Raises:
            ValueError: it is not JSON in UTF-8.
        """
        text = file.read_bytes().decode()
        settings, model = members_before(text, "model") or ({}, 0)
        if not settings.keys() >= set(_DECIDING):  # the library writes the model at the end, other programs may not
            return cls(json.loads(text), "}")
        return cls(settings, f', "model": {text[model:]}')

    def text(self) -> str:
        """Write the content as JSON."""
        return json.dumps(self.settings)[:-1] + self.end

    def without_model(self) -> "TokenizerJson":
        """Return the settings that decide how texts are encoded and decoded, alone."""
        return TokenizerJson({name: self.settings.get(name) for name in _DECIDING}, "}")

    def encodes_like(self, other: "TokenizerJson") -> bool:
        """Whether texts have the same ids as with other settings of the same file."""
        return all(self.settings.get(name) == other.settings.get(name) for name in ("normalizer", "pre_tokenizer"))

    def without_leading_space(self) -> "TokenizerJson":
        """Change the settings so that no space is added before a text, and none removed in decoding."""
        changed = {name: _plain(self.settings.get(name)) for name in _DECIDING}
        return TokenizerJson({**self.settings, **changed}, self.end)

    def as_transformers(self, config: Mapping[str, Any]) -> "TokenizerJson":
        """Change the settings as transformers does when it opens the file.

        Its classes for Llama keep vocabulary and merges of the file, but write the space before texts in their own way.

        Args:
            config: content of ``tokenizer_config.json``.
        """
        name = class_name(config)
        llama = name in LLAMA_CLASSES
        if not llama or '"ByteLevel"' in json.dumps(self.settings.get("pre_tokenizer")):
            return self
        scheme = "always" if name == "LlamaTokenizer" and config.get("legacy") else "first"
        if config.get("add_prefix_space") is False:
            scheme = "never"
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        return TokenizerJson({**self.settings, "normalizer": None, "pre_tokenizer": space}, self.end)


def class_name(config: Mapping[str, Any]) -> str:
    """Name of transformers' class for a tokenizer, by its ``tokenizer_config.json``; empty if it names none."""
    return str(config.get("tokenizer_class") or "").removesuffix("Fast")


def _plain(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Remove the handling of a leading space from a normalizer, pre-tokenizer or decoder."""
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

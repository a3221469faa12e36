"""Folders and files that are no tokenizer of the kind that was asked for: what they are instead, and what to do."""

import json
from collections.abc import Sequence
from pathlib import Path

JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_CONFIG = "tokenizer_config.json"
_AS_SENTENCEPIECE = "give --tokenizer-type SentencePieceTokenizer"
# formats of other libraries by pattern, and whose they are
_FOREIGN = {"tekken.json": "mistral-common's", "*.tiktoken": "tiktoken's"}


def without_json(model: Path) -> str:
    """Why a path has no ``tokenizer.json``, for a message that begins with the path, and what to do."""
    if reason := _elsewhere(model, JSON):
        return reason
    if (model / SENTENCEPIECE).is_file():
        # tokens that were added to the SentencePiece model are in the configuration alone
        remedy = _conversion(model) if (model / _CONFIG).is_file() else _AS_SENTENCEPIECE
        return f"has {SENTENCEPIECE} and no {JSON}; {remedy}"
    if (model / "vocab.json").is_file():
        known = any((model / name).is_file() for name in (_CONFIG, "config.json"))
        return f"has vocab.json and no {JSON}; {_conversion(model) if known else _download(model)}"
    for pattern, owner in _FOREIGN.items():
        if file := next(model.glob(pattern), None):
            return f"has {file.name}, which is {owner} format, and no {JSON}; {_download(model)}"
    return f"no {JSON} there; give a Hugging Face folder"


def without_model(model: Path) -> str:
    """Why a path has no ``tokenizer.model``, for a message that begins with the path, and what to do."""
    if reason := _elsewhere(model, SENTENCEPIECE):
        return reason
    if (model / JSON).is_file():
        return f"has {JSON} and no {SENTENCEPIECE}; leave --tokenizer-type SentencePieceTokenizer out"
    return f"no {SENTENCEPIECE} there; give a SentencePiece .model"


def remedy_for(file: Path, kind: str) -> str:
    """Suggest a remedy by the usual causes where a file cannot be read; empty for others.

    Args:
        file: that could not be read.
        kind: the ``--tokenizer-type`` that it was read as.
    """
    if kind == "SentencePieceTokenizer" and file.suffix == ".json":
        return f"; leave --tokenizer-type {kind} out"
    if kind == "SentencePieceTokenizer":
        return ""
    if file.suffix == ".model":
        return f"; {_AS_SENTENCEPIECE}"
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return "; download it again"
    newer = isinstance(whole, dict) and "model" in whole
    return "; a newer version of the library may have written it: pip install --upgrade tokenizers" if newer else ""


def _elsewhere(model: Path, name: str) -> str | None:
    """Why a folder is not there, or has the file in a folder of the hub's cache within; ``None`` otherwise."""
    if not model.exists():
        # a name on the hub has one slash and begins neither here nor at the root
        hub = len(model.parts) == 2 and not model.is_absolute() and model.parts[0] not in (".", "..")
        return f"no such file or folder{f'; to download it, run: hf download {model} --local-dir DIR' if hub else ''}"
    snapshots: Sequence[Path] = sorted(model.glob(f"snapshots/*/{name}"))
    return f"no {name} there, as it is a folder of the hub's cache; give {snapshots[-1].parent}" if snapshots else None


def _conversion(folder: Path) -> str:
    return (
        f"write it: python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{folder}')"
        f".save_pretrained('{folder}')\""
    )


def _download(folder: Path) -> str:
    return f"download {JSON} of the model into {folder}"

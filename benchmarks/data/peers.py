"""Libraries that tokenise, each alone in a process: ``python peers.py NAME FILE TOKENIZER``; prints how many tokens.

All read the same file of ``text`` records and end with every document's ids as the library returns them: no mask, no
file written, nothing packed. Nothing here needs mft_megatron.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

BATCH = 1000  # texts at a time


def batches(file: str) -> Iterator[list[str]]:
    """The texts of a file of ``text`` records."""
    texts = []
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            if len(texts) == BATCH:
                yield texts
                texts = []
    if texts:
        yield texts


def tokenizers(file: str, model: str) -> int:
    """Encode with the library of a Hugging Face folder."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(f"{model}/tokenizer.json")
    return sum(
        len(encoding.ids)
        for texts in batches(file)
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)
    )


def gigatoken(file: str, model: str) -> int:
    """Encode with gigatoken: one thread, arrays out."""
    import gigatoken

    tokenizer = gigatoken.Tokenizer(f"{model}/tokenizer.json")
    return sum(len(tokenizer.encode(text)) for texts in batches(file) for text in texts)


def sentencepiece(file: str, model: str) -> int:
    """Encode with the library of a SentencePiece model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    return sum(len(ids) for texts in batches(file) for ids in processor.encode(texts))


def tiktoken(file: str, model: str) -> int:
    """Encode with tiktoken: the same vocabulary and merges, given as ranks."""
    import tiktoken

    content = json.loads(Path(model, "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    byte_of = _bytes_of_characters()
    ranks = {
        bytes(byte_of[character] for character in token): number - len(special)
        for token, number in content["model"]["vocab"].items()
        if token not in special
    }
    gpt2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    encoding = tiktoken.Encoding("own", pat_str=gpt2, mergeable_ranks=ranks, special_tokens={})
    return sum(len(ids) for texts in batches(file) for ids in encoding.encode_ordinary_batch(texts, num_threads=1))


def _bytes_of_characters() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to its byte: printable ones to themselves, others from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def datasets_map(file: str, model: str) -> int:
    """``datasets.map`` with a tokenizer of transformers, in batches; its result is in an Arrow file."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": ids, "length": [len(tokens) for tokens in ids]}

    with tempfile.TemporaryDirectory() as cache:
        texts = datasets.load_dataset("json", data_files=file, cache_dir=cache)["train"]
        return sum(texts.map(encode, batched=True, remove_columns=["text"])["length"])


PEERS: dict[str, Callable[[str, str], int]] = {
    "tokenizers": tokenizers,
    "gigatoken": gigatoken,
    "sentencepiece": sentencepiece,
    "tiktoken": tiktoken,
    "datasets": datasets_map,
}

if __name__ == "__main__":
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # functions and files here are called like libraries
    print(PEERS[sys.argv[1]](sys.argv[2], sys.argv[3]))

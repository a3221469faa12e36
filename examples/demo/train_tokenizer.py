"""A small byte-level BPE tokenizer out of the demo's JSONL tasks, as a Hugging Face folder.

```
TASK.jsonl … ─► every text of every record ─► merges of the most frequent pairs ─► tokenizer.json
names and roles of the special tokens ─► tokenizer_config.json, special_tokens_map.json
```

Bytes are the alphabet, so every text comes back exactly. The same files and options give the same bytes.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from make_tasks import strings_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
# Ids 0 … 6, in this order.
SPECIAL_TOKENS = [
    END_OF_TEXT,
    PADDING,
    "<|im_start|>",
    "<|im_end|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
]


def texts_of(files: list[Path]) -> Iterator[str]:
    """Every text of every record, file by file."""
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield from strings_of(json.loads(line))


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most ``vocab_size`` tokens, the special ones and the 256 bytes included."""
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    parts = (part for text in texts for part in special.split(text))  # no merges within special tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(parts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder that ``transformers.AutoTokenizer.from_pretrained`` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "additional_special_tokens": [token for token in SPECIAL_TOKENS if token not in (END_OF_TEXT, PADDING)],
    }
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the options, train, save, and print the length of the texts in tokens."""
    parser = argparse.ArgumentParser(description="Train a small byte-level BPE tokenizer on the demo's tasks.")
    parser.add_argument("--tasks-dir", type=Path, required=True, help="folder with one JSONL file per task")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args()
    files = sorted(options.tasks_dir.glob("*.jsonl"))
    if not files:
        parser.error(f"no .jsonl file in {options.tasks_dir}; make them with examples/demo/make_tasks.py")
    if options.vocab_size < 256 + len(SPECIAL_TOKENS):
        parser.error(f"--vocab-size {options.vocab_size} is too small for 256 bytes and {len(SPECIAL_TOKENS)} tokens")

    texts = list(texts_of(files))
    tokenizer = train_tokenizer(iter(texts), options.vocab_size)
    save_tokenizer(tokenizer, options.output_dir)
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
    size = sum(len(text.encode()) for text in texts)
    print(
        f"{tokenizer.get_vocab_size()} tokens; {size} bytes of text are {tokens} tokens, {size / tokens:.2f} bytes each"
    )


if __name__ == "__main__":
    main()

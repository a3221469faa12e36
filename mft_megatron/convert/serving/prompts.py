"""Token sequences that a serving check compares logits on: built-in prompts of code models, or those of a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from mft_megatron.errors import InputError

# some languages, prose in another script, structured text
PROMPTS = {
    "python": "def merge_sort(values: list[int]) -> list[int]:\n    if len(values) < 2:\n        return values\n",
    "c++": "#include <vector>\n\ntemplate <typename T>\nT sum(const std::vector<T>& values) {\n    T total{};\n",
    "sql": "SELECT task, COUNT(*) AS samples\nFROM runs\nWHERE loss < 0.5\nGROUP BY task\nORDER BY",
    "json": '{"name": "check", "version": "1.0", "scripts": {"test": "',
    "chinese": "# 用 Python 写一个函数,判断一个字符串是不是回文\ndef is_palindrome(",
    "shell": "for file in $(git diff --name-only HEAD~1); do\n  if [[ $file == *.py ]]; then",
}
CHAT = [{"role": "user", "content": "Write a function that reverses a linked list, and test it."}]
# size of the random texts for a folder without a tokenizer
RANDOM_TEXTS, RANDOM_TOKENS = 4, 32


class ServedTokenizer(Protocol):
    """A tokenizer of transformers, as far as the checks use it."""

    def __len__(self) -> int:
        """Number of tokens, added ones included."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """Encode a text; the ids are ``input_ids``."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Names of tokens."""

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Render a conversation."""


def read_prompts(file: Path) -> dict[str, str]:
    """Read one prompt a line, named by its line number; a line that is a JSON string may contain line breaks.

    Raises:
        InputError: the file does not exist or has no prompt.
    """
    if not file.is_file():
        raise InputError(f"--prompts {file}: does not exist; give a text file with one prompt a line")
    prompts = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            content = json.loads(line)
        except ValueError:
            content = line
        text = content if isinstance(content, str) else line
        if text.strip():
            prompts[f"line {number}"] = text
    if not prompts:
        raise InputError(f"--prompts {file}: is empty; write one prompt a line")
    return prompts


def encode(
    tokenizer: ServedTokenizer | None, prompts: Mapping[str, str] | None, vocab_size: int, limit: int
) -> dict[str, list[int]]:
    """Encode prompts into token ids, by the prompt's name, cut to ``limit`` tokens.

    Args:
        tokenizer: tokenizer of transformers; ``None``: fixed random tokens replace the prompts.
        prompts: texts by name; ``None``: the built-in ones, and a chat where the tokenizer has a template.

    Raises:
        InputError: a token is not in the vocabulary, or there are no tokens.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(vocab_size, (RANDOM_TEXTS, min(RANDOM_TOKENS, limit)), generator=generator).tolist()
        return {f"random {number}": row for number, row in enumerate(rows, 1)}
    texts = PROMPTS if prompts is None else prompts
    encoded = {name: tokenizer(text)["input_ids"][:limit] for name, text in texts.items()}
    if prompts is None and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        encoded["chat"] = tokenizer(text, add_special_tokens=False)["input_ids"][:limit]
    for name, tokens in encoded.items():
        if not tokens:
            raise InputError(f"prompt {name}: the tokenizer makes no tokens of it; leave it out")
        if max(tokens) >= vocab_size:
            raise InputError(
                f"prompt {name}: the tokenizer gives token {max(tokens)}, the vocabulary has {vocab_size}; it is the "
                "tokenizer of another model"
            )
    return encoded

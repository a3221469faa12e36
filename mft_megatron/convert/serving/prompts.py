"""Token sequences that a serving check compares logits on: built-in prompts of code models, or those of a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

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
FEWEST_TOKENS = 64  # that a comparison is worth making of
# files that hold a vocabulary; without any, transformers makes an empty tokenizer for some models
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "*.tiktoken"),
)


class ServedTokenizer(Protocol):
    """A tokenizer of transformers, as far as the checks use it."""

    chat_template: str | None

    def __len__(self) -> int:
        """Number of tokens, added ones included."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """Encode a text; the ids are ``input_ids``."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Names of tokens."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""

    def get_chat_template(self, *, tools: Sequence[Mapping[str, Any]] | None) -> str:
        """The template of a conversation that declares ``tools``."""

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Render a conversation; :func:`render` names the options."""


def render(
    tokenizer: ServedTokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
) -> str:
    """Write the prompt of a conversation as a server does.

    Args:
        tokenizer: of the folder.
        messages: as in OpenAI's API.
        tools: that are declared.
        template: instead of the tokenizer's own.
    """
    options = {"tools": tools, "chat_template": template, "tokenize": False, "add_generation_prompt": True}
    return tokenizer.apply_chat_template(messages, **options)


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a file of a tokenizer's vocabulary."""
    return any(any(folder.glob(name)) for name in VOCABULARIES)


def read_prompts(file: Path) -> dict[str, str]:
    """Read one prompt a line, named by its line number; a line that is a JSON string may contain line breaks.

    Raises:
        InputError: the file does not exist, is no text or has no prompt.
    """
    if not file.is_file():
        raise InputError(f"--prompts {file}: does not exist; give a text file with one prompt a line")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {file}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    prompts = {}
    for number, line in enumerate(lines, 1):
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
        InputError: a token is not in the vocabulary, a prompt has no tokens, all together have fewer than
            :data:`FEWEST_TOKENS`, or there are prompts and no tokenizer.
    """
    if tokenizer is None:
        if prompts is not None:
            raise InputError("--prompts: the folder has no tokenizer to encode them; leave the option out")
        generator = torch.Generator().manual_seed(1)
        length = min(RANDOM_TOKENS, limit)
        shape = (-(-RANDOM_TEXTS * RANDOM_TOKENS // length), length)
        rows = torch.randint(vocab_size, shape, generator=generator).tolist()
        return {f"random {number}": row for number, row in enumerate(rows, 1)}
    texts = PROMPTS if prompts is None else prompts
    encoded = {name: tokenizer(text)["input_ids"][:limit] for name, text in texts.items()}
    if prompts is None and tokenizer.chat_template:
        encoded["chat"] = tokenizer(render(tokenizer, CHAT), add_special_tokens=False)["input_ids"][:limit]
    for name, tokens in encoded.items():
        if not tokens:
            raise InputError(f"prompt {name}: the tokenizer makes no tokens of it; leave it out")
        if max(tokens) >= vocab_size:
            raise InputError(
                f"prompt {name}: the tokenizer gives token {max(tokens)}, the vocabulary has {vocab_size}; it is the "
                "tokenizer of another model"
            )
    total = sum(map(len, encoded.values()))
    if total < FEWEST_TOKENS:
        raise InputError(
            f"{'--prompts' if prompts else '--max-tokens'}: {total} tokens are too few to tell two models apart; "
            f"compare at least {FEWEST_TOKENS}, with longer prompts or a larger --max-tokens"
        )
    return encoded

"""Comparing two tokenizers by the ids of texts: one tokenizer can be written in several ways."""

from collections.abc import Iterator

from .tokenizer import Tokenizer

# tokenizers with one vocabulary differ in how they split these: spaces, line breaks, digits, signs, scripts, case
TEXTS = (
    "def f(x_1, *args):\n\treturn  x_1 + 12345678.90e-10\n\n\n        # 3.14159 != 0x7fff\r\n",
    " a  b   c    d     e\t\t\tf \n \n\n  g",
    "HTTPServer's don't I'LL camelCase snake_case SHOUTING 2026-01-31T23:59:59Z",
    "naïve café Ångström Straße Ελληνικά Русский текст 中文分词测试 日本語のテキスト 한국어 العربية עברית हिन्दी",
    "½ × ≠ → ∀x∈ℝ 👩‍💻🚀 e\u0301 \u00a0\u200b\ufeff ﬁ Ⅷ ...;;;:::!!!???===>>>{{{}}}</div>\\\\\"'`~@#$%^&*",
)


def tokenizer_difference(one: Tokenizer, other: Tokenizer, names: tuple[str, str]) -> str | None:
    """The first text or special token that has other ids in one tokenizer than in another, in words.

    The text of every token is encoded by both, so that a vocabulary in another order, a merge or a rule that one of
    them lacks is seen. Special tokens that only one of them has are ignored: their names are text to both.

    Args:
        one: tokenizer.
        other: tokenizer.
        names: of what they belong to.

    Returns:
        ``None`` if there is none.
    """
    for name in sorted(one.special_tokens.keys() & other.special_tokens.keys()):
        one_id, other_id = one.special_tokens[name].id, other.special_tokens[name].id
        if one_id != other_id:
            return f"{name} is {one_id} in {names[0]} and {other_id} in {names[1]}"
    texts = list(dict.fromkeys((*TEXTS, *_token_texts(one), *_token_texts(other))))
    for text, one_ids, other_ids in zip(texts, one.encode_batch(texts), other.encode_batch(texts), strict=True):
        if one_ids != other_ids:
            return f"{text[:30]!r} is {_first_ids(one_ids)} in {names[0]} and {_first_ids(other_ids)} in {names[1]}"
    return None


def _token_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each token, and the names of special ones."""
    special = {token.id for token in tokenizer.special_tokens.values()}
    yield from tokenizer.special_tokens
    for token_id in range(tokenizer.vocab_size):
        if token_id not in special and (text := tokenizer.decode([token_id])):
            yield text


def _first_ids(ids: list[int]) -> str:
    return " ".join(map(str, ids[:4])) + (" …" if len(ids) > 4 else "")

"""Whether the data set was made with the tokenizer of the model that a run starts from.

Not by name or byte: one and the same tokenizer is written in several ways, and people add special tokens to it for the
data. What matters is that a text is the same ids for both, or the model is trained on what it reads as noise.
"""

from collections.abc import Iterator
from pathlib import Path

from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.tokenizers.load import TOKENIZERS, load_tokenizer
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError
from mft_megatron.run_folder import HUGGINGFACE, TOKENIZER

FILES = {"HuggingFaceTokenizer": "tokenizer.json", "SentencePieceTokenizer": "tokenizer.model"}
# what tokenizers of one vocabulary cut differently: runs of spaces, line breaks, digits, signs, scripts, case
TEXTS = (
    "def f(x_1, *args):\n\treturn  x_1 + 12345678.90e-10\n\n\n        # 3.14159 != 0x7fff\r\n",
    " a  b   c    d     e\t\t\tf \n \n\n  g",
    "HTTPServer's don't I'LL camelCase snake_case SHOUTING 2026-01-31T23:59:59Z",
    "naïve café Ångström Straße Ελληνικά Русский текст 中文分词测试 日本語のテキスト 한국어 العربية עברית हिन्दी",
    "½ × ≠ → ∀x∈ℝ 👩‍💻🚀 e\u0301 \u00a0\u200b\ufeff ﬁ Ⅷ ...;;;:::!!!???===>>>{{{}}}</div>\\\\\"'`~@#$%^&*",
)


def check_model_tokenizer(arguments: Arguments, dataset: PackedDataset) -> str:
    """Compare the tokenizer that came with the model of ``--hf-checkpoint`` or ``--load`` with the data set's.

    Returns:
        a line for the log, or nothing where they are one.

    Raises:
        InputError: a text is other ids for one than for the other, or that cannot be found out although it can be made
            possible.
    """
    if arguments.resume is None or arguments.resume.info.dataset_hash == dataset.dataset_hash:
        return ""
    start = arguments.base or arguments.resume
    info = start.info
    made_with, prefix = dataset.ledger.tokenizer, arguments.data.data_path
    if info.tokenizer.get("fingerprint") == made_with.fingerprint:
        return ""
    folder = start.path
    if not (arguments.starts_from_hf or arguments.reads_hf):
        folder = folder.parent / (TOKENIZER if info.tokenizer else HUGGINGFACE)
    present = [kind for kind in TOKENIZERS if (folder / FILES[kind]).is_file()]
    unknown = f"whether {prefix} was made with the model's tokenizer is not known: "
    if not present:
        return f"{unknown}{folder} has no {' or '.join(FILES.values())}"
    try:
        model = load_tokenizer(made_with.type if made_with.type in present else present[0], folder)
    except InputError as error:
        return f"{unknown}{error}"
    if (model.type, model.fingerprint) == (made_with.type, made_with.fingerprint):
        return ""
    own = _of_data(arguments, dataset, folder)
    found = difference(model, own)
    if found is not None:
        raise InputError(
            f"{folder}: the model's tokenizer is another one than {prefix} was made with: {found}. Preprocess the data "
            f"with --tokenizer-type {model.type} --tokenizer-model {folder}; special tokens alone may be added to it"
        )
    names = sorted(own.special_tokens.keys() - model.special_tokens.keys())
    added = f"; it knows these special tokens besides: {', '.join(names)}" if names else ""
    return f"the data set's tokenizer is another one than the model's in {folder}, with the same ids for texts{added}"


def _of_data(arguments: Arguments, dataset: PackedDataset, folder: Path) -> Tokenizer:
    """The tokenizer that the data set was made with, from where it was then or is said to be now."""
    made_with, prefix = dataset.ledger.tokenizer, arguments.data.data_path
    place = arguments.data.tokenizer_model or made_with.model
    try:
        own = load_tokenizer(made_with.type, place)
    except InputError:
        own = None
    if own is None or own.fingerprint != made_with.fingerprint:
        raise InputError(
            f"{folder}: the model's tokenizer is not byte by byte the one that {prefix} was made with, and that one is "
            f"no longer at {place}, so that their ids cannot be compared; say with --tokenizer-model where it is, or "
            f"preprocess the data with --tokenizer-model {folder}"
        )
    return own


def difference(model: Tokenizer, data: Tokenizer) -> str | None:
    """A text or special token that has other ids for the model's tokenizer than for the data set's; ``None`` where
    there is none.

    Each token's own text is cut by both, so that a vocabulary in another order, a merge or a rule that the other does
    not have shows. Special tokens that only one of them has are passed over: their names are text to both.
    """
    for name in sorted(model.special_tokens.keys() & data.special_tokens.keys()):
        one, other = model.special_tokens[name].id, data.special_tokens[name].id
        if one != other:
            return f"{name} is {one} in the model and {other} in the data"
    texts = list(dict.fromkeys((*TEXTS, *_texts(model), *_texts(data))))
    for text, one, other in zip(texts, model.encode_batch(texts), data.encode_batch(texts), strict=True):
        if one != other:
            return f"{text[:30]!r} is {_some(one)} to the model and {_some(other)} in the data"
    return None


def _texts(tokenizer: Tokenizer) -> Iterator[str]:
    """What each token says, and the names of special ones."""
    special = {token.id for token in tokenizer.special_tokens.values()}
    yield from tokenizer.special_tokens
    for number in range(tokenizer.vocab_size):
        if number not in special and (text := tokenizer.decode([number])):
            yield text


def _some(ids: list[int]) -> str:
    return " ".join(map(str, ids[:4])) + (" …" if len(ids) > 4 else "")

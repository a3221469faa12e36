"""Tokenizers of each kind, trained on modules of source code, and small data sets that use them."""

import dataclasses
import json

import pytest

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.preprocessing.preprocess import preprocess
from mft_megatron.data.preprocessing.recipe import Recipe
from mft_megatron.data.tasks.task_files import TaskFiles
from mft_megatron.data.tokenizers.load import load_tokenizer
from tests import source_code

SOURCES = [source_code.module(seed, functions) for seed, functions in ((4, 136), (5, 120), (6, 80))]


@pytest.fixture(scope="session")
def llama_like_folder(tmp_path_factory):
    """A Hugging Face tokenizer like that of Llama 2: byte fallback, and a space before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    space = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator((word for text in SOURCES for word in text.split(" ")), trainer)
    folder = tmp_path_factory.mktemp("llama_like")
    tokenizer.save(str(folder / "tokenizer.json"))
    # bytes had to be special tokens to enter the vocabulary; they are ordinary tokens afterwards
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def train_sentencepiece(tmp_path_factory):
    """A function that trains a SentencePiece model with some options and returns its file."""
    import sentencepiece

    def train(**options):
        path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("".join(SOURCES).splitlines(keepends=True)),
            model_prefix=str(path.with_suffix("")),
            vocab_size=700,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
        return path

    return train


@pytest.fixture(scope="session")
def sentencepiece_model(train_sentencepiece):
    """A SentencePiece model with a dummy prefix and whitespace cleaning; opening it must switch both off."""
    return train_sentencepiece(normalization_rule_name="identity")


@pytest.fixture(scope="session", params=["byte-level", "llama-like", "sentencepiece"])
def tokenizer(request, tokenizer_folder, llama_like_folder, sentencepiece_model):
    """One tokenizer of each kind."""
    return {
        "byte-level": lambda: load_tokenizer("HuggingFaceTokenizer", tokenizer_folder),
        "llama-like": lambda: load_tokenizer("HuggingFaceTokenizer", llama_like_folder),
        "sentencepiece": lambda: load_tokenizer("SentencePieceTokenizer", sentencepiece_model),
    }[request.param]()


@pytest.fixture(scope="session", params=["byte-level", "llama-like", "sentencepiece"])
def both(request, tokenizer_folder, llama_like_folder, sentencepiece_model):
    """One tokenizer of each kind twice: with the reference, and with gigatoken."""
    kind, model = {
        "byte-level": ("HuggingFaceTokenizer", tokenizer_folder),
        "llama-like": ("HuggingFaceTokenizer", llama_like_folder),
        "sentencepiece": ("SentencePieceTokenizer", sentencepiece_model),
    }[request.param]
    return [load_tokenizer(kind, model, backend) for backend in ("reference", "gigatoken")]


def space_before_texts(tokenizer):
    """Return what a tokenizer of :func:`tokenizer` writes before a text at the beginning of a raw sample."""
    byte_level = tokenizer.token_id("Ġ") is not None
    return "" if byte_level else " "


def functions():
    """Return functions that are not in the modules."""
    return source_code.functions(seed=7, count=336)


def write_task(folder, name, records):
    """Write records to a file and return its path."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


TASKS = {
    "complete": lambda code: [{"prompt": text[:20], "completion": text[20:]} for text in code],
    "chat": lambda code: [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": text},
                {"role": "assistant", "content": text.split("(")[0]},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "That is all."},
            ]
        }
        for text in code[::3]
    ],
    "rounds": lambda code: [
        {"chat_rounds": [{"role": "human", "content": text}, {"role": "bot", "content": text[:20]}]}
        for text in code[::7]
    ],
    "read": lambda code: [{"text": text} for text in code[::5]],
}


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory, tokenizer_folder):
    """A function that preprocesses records, by default those of :data:`TASKS`, and returns prefix and ledger."""

    def make(records=None, **options):
        folder = tmp_path_factory.mktemp("made")
        if records is None:
            records = {name: make_records(functions()) for name, make_records in TASKS.items()}
        names = {field.name for field in dataclasses.fields(PackingOptions)}
        packing = {name: options.pop(name) for name in names & set(options)}
        recipe = dict(
            tasks={
                name: TaskFiles(name, (write_task(folder, name, task_records),))
                for name, task_records in records.items()
            },
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tokenizer_folder),
            chat_template="chatml",
            output_prefix=folder / "set",
            packing=PackingOptions(**{"seq_length": 256, "split": (80.0, 15.0, 5.0), **packing}),
        )
        recipe = Recipe(**{**recipe, **options})
        ledger, _ = preprocess(recipe)
        return str(recipe.output_prefix), ledger

    return make


@pytest.fixture(scope="session")
def dataset(make_dataset):
    """The records of :data:`TASKS`, packed for 256 tokens and opened."""
    return PackedDataset.open(make_dataset()[0], 256, check="hashes")

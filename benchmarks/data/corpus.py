"""Samples and tokenizers for the benchmarks of the data room, made from the standard library and kept in a folder."""

import json
import sysconfig
from pathlib import Path

import numpy as np

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHARACTERS_OF_A_TOKEN = 3.9  # in these texts, with a vocabulary of 32000


def library() -> list[str]:
    """The modules of the standard library, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:  # a test of other encodings
                continue
    return texts


def write_samples(folder: Path, number: int, mean_tokens: float, seed: int) -> Path:
    """Samples with lognormal lengths (sigma 0.9: many short, few long ones), a third of each the question.

    The same samples are in three files: ``messages.jsonl`` as chats, ``text.jsonl`` as documents, ``chat_rounds.jsonl``
    as MFTCoder has chats, each in its folder.

    Returns:
        The folder that holds those folders.
    """
    target = folder / f"samples-{number}-{mean_tokens:g}-{seed}"
    if target.exists():
        return target
    text = "".join(library())
    rng = np.random.default_rng(seed)
    mean = np.log(mean_tokens * CHARACTERS_OF_A_TOKEN) - 0.9**2 / 2
    making = target.with_suffix(".making")
    files = {}
    for name in ("messages", "text", "chat_rounds"):
        (making / name).mkdir(parents=True, exist_ok=True)
        files[name] = open(making / name / f"{name}.jsonl", "w", encoding="utf-8")  # noqa: SIM115
    for length in np.clip(rng.lognormal(mean, 0.9, number), 40, 100_000).astype(int).tolist():
        start = int(rng.integers(len(text) - length))
        question, answer = text[start : start + length // 3], text[start + length // 3 : start + length]
        records = {
            "messages": {"messages": [_turn("user", question), _turn("assistant", answer)]},
            "text": {"text": question + answer},
            "chat_rounds": {"chat_rounds": [_turn("human", question), _turn("bot", answer)]},
        }
        for name, record in records.items():
            files[name].write(json.dumps(record, ensure_ascii=False) + "\n")
    for file in files.values():
        file.close()
    making.rename(target)
    return target


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def byte_level_tokenizer(folder: Path, vocab_size: int) -> Path:
    """A Hugging Face folder with a byte-level BPE, and a ``config.json``, which some tools require."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    target = folder / f"byte-level-{vocab_size}"
    if target.exists():
        return target
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(library(), trainer)
    making = target.with_suffix(".making")
    making.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(making / "tokenizer.json"))
    config = {"eos_token": SPECIAL[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    (making / "tokenizer_config.json").write_text(json.dumps(config))
    (making / "config.json").write_text('{"model_type": "gpt2"}')
    making.rename(target)
    return target


def sentencepiece_model(folder: Path, vocab_size: int) -> Path:
    """A SentencePiece BPE with bytes as fallback, trained on an eighth of the standard library."""
    import sentencepiece

    target = folder / f"sentencepiece-{vocab_size}.model"
    if not target.exists():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in library()[::8] for line in text.splitlines(keepends=True)),
            model_prefix=str(target.with_suffix(".making")),
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
        target.with_suffix(".making.model").rename(target)
        target.with_suffix(".making.vocab").unlink()
    return target

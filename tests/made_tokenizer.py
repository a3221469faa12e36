"""A Hugging Face tokenizer folder: byte-level BPE with 500 ids, trained on a module of source code."""

import json
from pathlib import Path

from tests import source_code


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer into an existing folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([source_code.module(seed=1, functions=136)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0], "pad_token": special[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

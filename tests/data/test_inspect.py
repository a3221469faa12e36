"""Showing samples: with the tokenizer of the data set, and without control characters."""

import shutil

import numpy as np
import pytest

from mft_megatron.data.inspect import MARKS, marked, show_samples
from mft_megatron.errors import InputError


class Characters:
    """A tokenizer with one id for each character."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_control_characters_do_not_reach_the_terminal():
    text = "".join(map(chr, range(256))) + "é漢🙂"
    mask = np.zeros(len(text), np.uint8)
    mask[20:40] = 1
    shown = marked(Characters(), np.array(list(map(ord, text))), mask, colour=False)
    assert "\x1b" not in shown
    assert r"\x1a⟦" not in shown
    assert r"\x13⟦\x14" in shown
    assert r"\x1b" in shown
    control = {character for character in shown if ord(character) < 32 or 127 <= ord(character) < 160}
    assert control == {"\n", "\t"}
    assert shown.endswith("þÿé漢🙂")
    assert marked(Characters(), np.array([27]), np.ones(1), colour=True) == r"\x1b".join(MARKS[True])


@pytest.fixture
def movable(tokenizer_folder, tmp_path):
    return shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")


def test_samples_are_shown_with_the_tokenizer_they_were_made_with_only(make_dataset, movable, llama_like_folder):
    records = {"task": [{"prompt": "def f", "completion": "(x)"}, {"prompt": "a", "completion": "b\x1b[31m"}]}
    prefix, ledger = make_dataset(records, tokenizer_model=str(movable), split=(1.0, 0.0, 0.0))
    shown = "".join(show_samples(prefix, ledger, 2, colour=False))
    assert "def f⟦(x)" in shown
    assert r"a⟦b\x1b[31m" in shown
    shutil.copy(llama_like_folder / "tokenizer.json", movable)
    shutil.copy(llama_like_folder / "tokenizer_config.json", movable)
    with pytest.raises(InputError, match=r"is no longer the one that the data were made with.*--samples 0"):
        list(show_samples(prefix, ledger, 2, colour=False))
    assert list(show_samples(prefix, ledger, 0, colour=False)) == []

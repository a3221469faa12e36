"""The fast backend is used if it equals the reference, and differences later on are detected."""

import json
import pickle
import re
import shutil
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft_megatron.data.tokenizers import backends, gigatoken_backend
from mft_megatron.data.tokenizers.backends import (
    BackendError,
    BackendMismatch,
    CheckedBackend,
    DifferenceError,
    FastBackend,
)
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.errors import InputError
from tests.data.conftest import SOURCES, functions

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# combining marks, one of them unknown to one of the libraries; they order these differently
RARE_MARKS = "\U0001e132\u1bf2\u08d3\u0a4d"


@pytest.fixture(scope="session")
def variant(tokenizer_folder, tmp_path_factory):
    """A function that makes a tokenizer folder with parts of ``tokenizer.json`` or keys of its model replaced."""

    def make(model=(), **parts):
        folder = shutil.copytree(tokenizer_folder, tmp_path_factory.mktemp("variant") / "tokenizer")
        content = json.loads((folder / "tokenizer.json").read_text())
        content.update(parts)
        content["model"].update(model)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    return make


def split_at(pattern):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


@pytest.fixture(
    scope="session", params=["byte-level", "llama3-like", "qwen-like", "llama2-like", "sentencepiece", "nmt-nfkc-cf"]
)
def fast(request, tokenizer_folder, llama_like_folder, sentencepiece_model, train_sentencepiece, variant):
    """A tokenizer of each kind that gigatoken can read, with gigatoken."""
    kind = "SentencePieceTokenizer" if request.param in ("sentencepiece", "nmt-nfkc-cf") else "HuggingFaceTokenizer"
    model = {
        "byte-level": lambda: tokenizer_folder,
        "llama3-like": lambda: variant({"ignore_merges": True}, pre_tokenizer=split_at(LLAMA3)),
        "qwen-like": lambda: variant(pre_tokenizer=split_at(LLAMA3.replace("{1,3}", "")), normalizer={"type": "NFC"}),
        "llama2-like": lambda: llama_like_folder,
        "sentencepiece": lambda: sentencepiece_model,
        "nmt-nfkc-cf": lambda: train_sentencepiece(
            normalization_rule_tsv=write_rules(request), user_defined_symbols=["<tool>"]
        ),
    }[request.param]()
    return load_tokenizer(kind, model, "gigatoken")


def write_rules(request):
    """Write a character map that changes few characters and no line break; return its path."""
    path = request.getfixturevalue("tmp_path_factory").mktemp("rules") / "rules.tsv"
    path.write_text("E9\t65\nFB01\t66 69\n")
    return str(path)


def assert_as_reference(tokenizer, texts, markup=False):
    assert tokenizer.backend == "gigatoken"
    expected = tokenizer.encode_batch(texts, markup)
    assert [ids.tolist() for ids in tokenizer.encode_arrays(texts, markup)] == expected


@pytest.mark.parametrize("markup", [False, True])
def test_gigatoken_encodes_real_text_as_the_reference(fast, markup):
    name = fast.end_of_text
    texts = [*functions(), *SOURCES, *(line for text in SOURCES for line in text.splitlines(keepends=True))]
    assert_as_reference(fast, [*texts, *(f"{text}{name}{text}" for text in texts[:20]), *backends.HARD_TEXTS], markup)


characters = st.characters(exclude_categories=["Cs"])
texts = (
    st.text(characters, max_size=30)
    | st.text(st.sampled_from(" \n\t\r'sSltLR019aé中🙂\u0301_(.<|>"), max_size=30)
    | st.sampled_from(["</s>", "<|im_end|>x", "a <|endoftext|> b", "<tool> ", "▁▁", RARE_MARKS, "éﬁ", "<0x0A>"])
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(st.lists(st.lists(texts, max_size=4).map("".join), max_size=6), st.booleans())
def test_gigatoken_encodes_any_text_as_the_reference(fast, texts, markup):
    assert_as_reference(fast, texts, markup)


def test_the_note_names_the_backend(tokenizer_folder, sentencepiece_model):
    for kind, model, reference in (
        ("HuggingFaceTokenizer", tokenizer_folder, "hf"),
        ("SentencePieceTokenizer", sentencepiece_model, "sentencepiece"),
    ):
        auto = load_tokenizer(kind, model, "auto")
        assert auto.backend == "gigatoken"
        assert reference in auto.backend_note
        for name in ("reference", reference):
            plain = load_tokenizer(kind, model, name)
            assert (plain.backend, plain.backend_note) == (reference, "")
        other = {"hf": "sentencepiece", "sentencepiece": "hf"}[reference]
        with pytest.raises(InputError, match=f"--tokenizer-backend {other}: cannot read a {kind}; give .*{reference}"):
            load_tokenizer(kind, model, other)


UNFIT = {
    "dropout": dict(model={"dropout": 0.5}),
    "end_of_word_suffix": dict(model={"end_of_word_suffix": "</w>"}),
    "cannot read this tokenizer.*NFKC": dict(normalizer={"type": "NFKC"}),
    "cannot read this tokenizer.*Unknown pre_tokenizer": dict(pre_tokenizer=split_at("[a-z]+|[^a-z]+")),
    # gigatoken opens this one, but splits at words, which the reference does not
    "not equal to the reference: .* is tokenised differently": dict(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    ),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_auto_uses_the_reference_if_gigatoken_does_not_fit_and_says_why(variant, reason):
    folder = variant(**UNFIT[reason])
    auto = load_tokenizer("HuggingFaceTokenizer", folder, "auto")
    assert auto.backend == "hf"
    assert "\n" not in auto.backend_note
    with pytest.raises(InputError, match=f"^--tokenizer-backend gigatoken: .*{reason}.*; give auto or hf$") as error:
        load_tokenizer("HuggingFaceTokenizer", folder, "gigatoken")
    assert str(error.value).removeprefix("--tokenizer-backend gigatoken: ").removesuffix("; give auto or hf") in (
        auto.backend_note
    )
    if "dropout" not in reason:
        assert [ids.tolist() for ids in auto.encode_arrays(["a b"])] == auto.encode_batch(["a b"])


def test_models_that_gigatoken_does_not_read_stay_with_sentencepiece(train_sentencepiece):
    model = train_sentencepiece(treat_whitespace_as_suffix=True, normalization_rule_name="identity")
    assert load_tokenizer("SentencePieceTokenizer", model, "auto").backend == "sentencepiece"


def test_without_gigatoken_everything_works(monkeypatch, tokenizer_folder):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    auto = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder, "auto")
    assert auto.backend == "hf"
    assert "cannot be imported" in auto.backend_note
    with pytest.raises(InputError, match="gigatoken cannot be imported"):
        load_tokenizer("HuggingFaceTokenizer", tokenizer_folder, "gigatoken")


# --------------------------------------------------------------------------------------------------- with fake backends


def encode_characters(text):
    return np.array([ord(character) for character in text], np.uint32)


def reference(texts, markup):
    """Encode each character as one id; <> is one token in markup."""
    if markup:
        texts = [text.replace("<>", "\0") for text in texts]
    return [np.array([ord(character) for character in text], np.int32) for text in texts]


def wrong_for(bad, error=None):
    def encode(text):
        if text == bad and error is not None:
            raise error
        return encode_characters(text)[:-1] if text == bad else encode_characters(text)

    return FastBackend("fake", encode)


class PanicError(BaseException):
    """An error like the panics of a Rust extension, which are no ``Exception``."""


@pytest.mark.parametrize("error", [None, ValueError("no"), PanicError("panicked")])
@pytest.mark.parametrize("bad", backends.HARD_TEXTS[1:8])
def test_a_backend_that_is_wrong_on_a_hard_text_is_refused(bad, error):
    with pytest.raises(BackendError, match=r"not equal to the reference: .* is tokenised"):
        CheckedBackend(wrong_for(bad, error), reference, ["<>"]).prove()
    CheckedBackend(wrong_for("something else"), reference, ["<>"]).prove()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupts_and_memory_errors_pass_through(error):
    with pytest.raises(error):
        CheckedBackend(wrong_for(" ", error()), reference, []).prove()


@pytest.mark.parametrize("bad", range(0, backends.FIRST_TEXTS + 4, 3))
def test_all_of_the_first_texts_are_compared(bad):
    # every fourth text goes to the reference, so indices shift
    texts = [f"<>{number}" if number % 4 == 2 else f"text {number}" for number in range(backends.FIRST_TEXTS + 30)]
    texts[bad] = f"text {bad}"
    with pytest.raises(DifferenceError) as difference:
        CheckedBackend(wrong_for(texts[bad]), reference, ["<>"]).encode(texts, markup=True)
    assert difference.value.position == bad


def test_the_first_texts_may_come_in_several_calls():
    checked = CheckedBackend(wrong_for("bad"), reference, [])
    checked.encode(["a"] * (backends.FIRST_TEXTS - 1), False)
    with pytest.raises(DifferenceError):
        checked.encode(["bad"], False)


def test_long_texts_end_the_first_ones_early(monkeypatch):
    monkeypatch.setattr(backends, "FIRST_CHARACTERS", 50)
    compared = []
    checked = CheckedBackend(
        FastBackend("fake", encode_characters),
        lambda texts, markup: compared.extend(texts) or reference(texts, markup),
        [],
    )
    texts = [text for text in (f"{number:020}" for number in range(20)) if not backends._is_sampled(text)]
    checked.encode(texts, False)
    assert compared == texts[:3]


def test_later_texts_are_compared_by_sample():
    texts = [f"text {number}" for number in range(20_000)]
    caught = []
    for bad in texts[:3000]:
        checked = CheckedBackend(wrong_for(bad), reference, [])
        checked.encode(["a"] * backends.FIRST_TEXTS, False)
        try:
            checked.encode([bad], False)
        except DifferenceError:
            caught.append(bad)
    assert 0.4 < len(caught) / (3000 / backends.SAMPLED_ONE_IN) < 1.8
    assert caught == [text for text in texts[:3000] if backends._is_sampled(text)]


@pytest.mark.parametrize("markup", [False, True])
def test_texts_with_names_of_tokens_go_to_the_reference(markup):
    seen = []
    fake = FastBackend("fake", lambda text: seen.append(text) or encode_characters(text))
    texts = ["a", "b<>c", "", "<|", "<>", "d"]
    got = CheckedBackend(fake, reference, ["<>"]).encode(texts, markup)
    assert [ids.tolist() for ids in got] == [ids.tolist() for ids in reference(texts, markup)]
    assert seen == ["a", "", "<|", "d"]


names = st.lists(st.text("<|ab▁ ", min_size=1, max_size=4), max_size=6)


@given(names, st.text("<|ab▁ ", max_size=12))
def test_names_are_found(names, text):
    searched = backends.Names(names)
    inside = any(spelled in text for name in names for spelled in (name, name.replace("▁", " ")))
    assert searched.in_(text) == inside
    assert searched.perhaps_in(text) or not inside


def test_characters_that_count_as_stable_are_stable():
    may_change = re.compile(gigatoken_backend._MAY_CHANGE)
    safe = [chr(code) for code in range(0x110000) if not may_change.match(chr(code))]
    assert len(safe) > 40_000
    for character in safe:
        assert unicodedata.combining(character) == 0
        assert unicodedata.normalize("NFC", character) == character
    for code in range(0x110000):  # no pair of them composes
        decomposed = unicodedata.normalize("NFD", chr(code))
        if len(decomposed) > 1 and unicodedata.normalize("NFC", decomposed) == chr(code):
            assert any(may_change.match(part) for part in decomposed[1:])


def test_long_texts_that_differ_in_length_or_at_an_end_are_sampled_apart():
    middle = "x" * 300
    texts = [text for n in range(5000) for text in (f"{n}{middle}", f"{middle}{n}", middle + "x" * n)]
    sampled = [sum(map(backends._is_sampled, texts[kind::3])) for kind in range(3)]
    assert all(0.3 < count / (5000 / backends.SAMPLED_ONE_IN) < 2 for count in sampled)


def test_a_mismatch_can_be_pickled():
    mismatch = pickle.loads(pickle.dumps(BackendMismatch("file:3: words")))
    assert str(mismatch) == "file:3: words"

"""Large texts are split, and the ids are those of the whole text."""

import base64
import itertools
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft_megatron.data.tokenizers import large_texts, tokenizer
from mft_megatron.data.tokenizers.backends import DifferenceError, FastBackend
from mft_megatron.data.tokenizers.large_texts import split_text
from tests.data.conftest import SOURCES, functions


@pytest.fixture
def small(monkeypatch):
    """A function that sets the size of large texts, of their parts, and of the text that is tested at borders."""

    def sizes(large, part, tested):
        monkeypatch.setattr(large_texts, "LARGE", large)
        monkeypatch.setattr(tokenizer, "LARGE", large)
        monkeypatch.setattr(large_texts, "PART", part)
        monkeypatch.setattr(large_texts, "TESTED", tested)

    return sizes


RANDOM = random.Random(5)
CODE = "".join(SOURCES)
ODD = {
    "code": CODE,
    "one line": " ".join(CODE.split()),
    "no space": base64.b64encode(CODE.encode()).decode(),
    "one word": "a" * 30_000,
    "spaces": " " * 30_000,
    "line breaks": "\n" * 30_000,
    "returns": CODE.replace("\n", "\r\n"),
    "Chinese": "".join(chr(RANDOM.randrange(0x4E00, 0x9FA0)) for _ in range(20_000)),
    "numbers": "".join(RANDOM.choices("0123456789", k=20_000)),
    "only names": "</s><|endoftext|>" * 2000,
    "names": f"{CODE[:9000]}</s>".join(CODE[9000:30_000].splitlines(keepends=True)[:20]),
}


@pytest.mark.parametrize("markup", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_parts_give_the_ids_of_the_whole(both, small, name, markup):
    texts = ["short", ODD[name], "", ODD[name][::-1][:9000], "x" * 50]
    expected = [np.array(ids) for ids in both[0].encode_batch(texts, markup)]
    small(8000, 4000, 500)
    for one in both:
        got = one.encode_arrays(texts, markup)
        for ids, expected_ids in zip(got, expected, strict=True):
            assert np.array_equal(ids, expected_ids)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=6) | st.sampled_from(["\n", "  ", "def ", "</s>", "é", "12"]), max_size=60))
def test_any_text_in_parts(both, small, parts):
    text = "".join(parts) + "x\ny z" * 30
    small(60, 30, 64)
    (expected,) = both[0].encode_batch([text])
    for one in both:
        assert one.encode_arrays([text])[0].tolist() == expected


def test_parts_are_small_and_make_the_text(both):
    text = CODE * (3 * large_texts.LARGE // len(CODE))
    parts = list(split_text(text, both[0].encode_batch))
    assert "".join(parts) == text
    assert len(parts) >= 5
    assert max(map(len, parts)) < 1.6 * large_texts.PART
    assert all(part.endswith("\n") or after.startswith(" ") for part, after in itertools.pairwise(parts))
    assert list(split_text(CODE, None)) == [CODE]


def pairs(texts):
    """Encode each pair of characters, from the beginning, as one token; so no odd position is a border."""
    return [
        [ord(one) * 1000 + ord(other) for one, other in itertools.zip_longest(*[iter(text)] * 2, fillvalue="\0")]
        for text in texts
    ]


def test_positions_that_change_ids_are_no_borders(small):
    small(100, 50, 20)
    text = "ab c\n" * 100
    parts = list(split_text(text, pairs))
    assert len(parts) > 4
    assert all(len(part) % 2 == 0 for part in parts[:-1])
    # a tokenizer for which the whole text is one token
    assert list(split_text(text, lambda texts: [[hash(part)] for part in texts])) == [text]


def test_the_reference_gets_a_few_texts_at_a_time(both, small, monkeypatch):
    small(1000, 500, 100)
    one, seen = both[0], []
    encode = one.encode_batch
    monkeypatch.setattr(
        one, "encode_batch", lambda texts, markup=False: seen.append(sum(map(len, texts))) or encode(texts, markup)
    )
    code = "\n\n".join(text for text in functions() if len(text) < 1000)  # lines without indentation are borders
    one.encode_arrays([code[:20_000], *["x = 1\n" * 20] * 50])
    assert sum(seen) > 26_000
    assert max(seen) < 3000


def test_a_difference_in_a_part_is_one_in_its_text(both, small, monkeypatch):
    one = both[1]
    right = one._checked._fast.encode
    monkeypatch.setattr(one._checked, "_fast", FastBackend("gigatoken", lambda text: right(text)[:-1]))
    monkeypatch.setattr(one._checked, "_first", 0)
    small(1000, 500, 100)
    asked = []
    monkeypatch.setattr(
        "mft_megatron.data.tokenizers.backends._is_sampled", lambda text: asked.append(text) or len(asked) == 9
    )
    with pytest.raises(DifferenceError) as difference:
        one.encode_arrays(["short", CODE[:1500], "short", CODE[1500:9000], "short"])
    assert difference.value.position == 3
    assert asked[8] in CODE[1500:9000]

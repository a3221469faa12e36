"""Fill-in-the-middle: no text is lost, rates are kept, and random numbers depend on seed and key alone."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft_megatron.data.records.conversation import Conversation, Turn
from mft_megatron.data.records.fim import FAMILIES, SHORTEST, Fim, FimFamily, fim_family, make_fim
from mft_megatron.data.records.segments import Segment, raw_segments
from mft_megatron.data.tokenizers.beginnings import Beginning, always
from mft_megatron.errors import InputError
from tests import source_code

P, S, M, END = "<P>", "<S>", "<M>", "<END>"
FAMILY = FimFamily((P, S, M), END)
SOURCE = source_code.module(seed=1, functions=136)
ALWAYS = {spm: Fim(1.0, float(spm), FAMILY, 7) for spm in (False, True)}


def document(text):
    return Conversation((Turn("completion", text),), raw=True, document=True)


def completion(prompt, text, learn=True):
    return Conversation((Turn("prompt", prompt), Turn("completion", text, learn)), raw=True)


def parts(segments, spm):
    """Return the segments of prefix, suffix and middle; check the order of the tokens."""
    segments = [segment for segment in segments if not segment.markup]
    names = [segment.text for segment in segments if segment.special]
    assert names == [P, S, M, END]
    content = [segment for segment in segments if not segment.special]
    order = [segment.text for segment in segments]
    assert order[0] == P
    assert order[-1] == END
    if spm:
        assert order[1] == S
        tail, head, gap, middle = content
        assert gap.text == ""
        assert order.index(M) == 3
    else:
        head, tail, middle = content
        assert [order[2], order[4]] == [S, M]
    return head, tail, middle


@given(text=st.text(min_size=SHORTEST), key=st.binary(max_size=8))
@pytest.mark.parametrize("spm", [False, True])
def test_the_parts_of_a_document_are_the_document(spm, text, key):
    segments = ALWAYS[spm].segments(document(text), key)
    head, tail, middle = parts(segments, spm)
    assert head.text + middle.text + tail.text == text
    # every segment with tokens is supervised, as without the cut
    assert all(segment.supervised for segment in segments if segment.text)


@given(prompt=st.text(), text=st.text(min_size=SHORTEST), key=st.binary(max_size=8))
@pytest.mark.parametrize("spm", [False, True])
def test_the_middle_of_a_completion_is_supervised(spm, prompt, text, key):
    segments = ALWAYS[spm].segments(completion(prompt, text), key)
    head, tail, middle = parts(segments, spm)
    assert head.text + middle.text + tail.text == text
    (index,) = (index for index, segment in enumerate(segments) if segment.markup)
    assert segments[index] == Segment(prompt, False, False, True)
    assert segments[index + 1] is head
    assert [segment for segment in segments if segment.supervised and segment.text] == [
        *([middle] if middle.text else []),
        Segment(END, True, special=True),
    ]


@pytest.mark.parametrize("conversation", [document(SOURCE), completion("x", SOURCE)])
def test_head_and_middle_are_tokenised_separately(conversation):
    """Adjacent segments of one kind are concatenated before they are tokenised."""
    for key in range(50):
        head, gap, middle = ALWAYS[True].segments(conversation, b"%d" % key)[-4:-1]
        assert head.supervised != gap.supervised or gap.supervised != middle.supervised


def test_only_prompts_are_markup_as_without_the_cut():
    for conversation, count in ((document(SOURCE), 0), (completion("a prompt", SOURCE), 1)):
        markup = [segment._replace(begins=False) for segment in raw_segments(conversation, END) if segment.markup]
        assert len(markup) == count
        for spm in (False, True):
            segments = ALWAYS[spm].segments(conversation, b"")
            assert [segment for segment in segments if segment.markup] == markup


def test_rates_are_kept():
    count = 20_000
    for rate, spm_rate in [(0.5, 0.5), (0.9, 0.1), (0.1, 0.9), (1.0, 0.0), (0.0, 0.5), (1.0, 1.0)]:
        transform = Fim(rate, spm_rate, FAMILY, 3)
        results = [transform.segments(document("abcdef"), b"%d" % key) for key in range(count)]
        cut = [segments for segments in results if segments is not None]
        spm = sum(segments[1].text == S and segments[1].special for segments in cut)
        for got, expected, of in ((len(cut), rate, count), (spm, spm_rate, len(cut))):
            deviation = (of * expected * (1 - expected)) ** 0.5
            assert abs(got - of * expected) <= 4 * deviation


def test_every_position_between_characters_is_cut_equally_often():
    count, positions = 30_000, 6
    lengths = [0] * positions
    for key in range(count):
        head, tail, _ = parts(ALWAYS[False].segments(document("abcde"), b"%d" % key), False)
        lengths[len(head.text)] += 1
        lengths[5 - len(tail.text)] += 1
    expected = 2 * count / positions
    assert all(abs(seen - expected) < 5 * expected**0.5 for seen in lengths)


def test_random_numbers_depend_on_seed_and_key_alone():
    keys = [b"%d" % number for number in range(200)]
    transform = Fim(0.5, 0.5, FAMILY, 7)
    results = {key: transform.segments(document(SOURCE), key) for key in keys}
    assert results == {key: transform.segments(document(SOURCE), key) for key in reversed(keys)}
    other = Fim(0.5, 0.5, FAMILY, 8)
    assert results != {key: other.segments(document(SOURCE), key) for key in keys}
    code = (
        "from mft_megatron.data.records.fim import Fim, FimFamily\n"
        "from mft_megatron.data.records.conversation import Conversation, Turn\n"
        f"fim = Fim(0.5, 0.5, {FAMILY!r}, 7)\n"
        "text = Conversation((Turn('completion', 'abcdef' * 9),), raw=True, document=True)\n"
        "print([fim.segments(text, b'%d' % key) for key in range(200)])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    text = document("abcdef" * 9)
    assert there.strip() == str([transform.segments(text, key) for key in keys])


@pytest.mark.parametrize(
    "conversation",
    [
        Conversation((Turn("user", "a question"), Turn("assistant", "an answer"))),
        document("ab"),
        completion("a long prompt", "ab"),
        completion("a", "b" * 99, learn=False),
    ],
)
def test_records_that_stay_unchanged(conversation):
    assert all(transform.segments(conversation, b"") is None for transform in ALWAYS.values())


class Vocabulary:
    end_of_text = END
    beginning = Beginning(None, always, False, None, None)

    def __init__(self, *names, plain=()):
        self.special_tokens = dict.fromkeys(names)
        self.token_id = {name: number for number, name in enumerate((END, *names, *plain))}.get


# what each family publishes: end token, share of SPM, and what stands before a prefix
PUBLISHED = {
    "CodeLlama": ("▁<PRE>", "▁<EOT>", 0.5, " "),
    "CodeGemma": ("<|fim_prefix|>", "<|file_separator|>", 0.5, ""),
    "Qwen": ("<|fim_prefix|>", "<|endoftext|>", 0.0, ""),
    "DeepSeek": ("<｜fim▁begin｜>", "<｜end▁of▁sentence｜>", 0.0, ""),
    "StarCoder": ("<fim_prefix>", "<|endoftext|>", 0.5, ""),
    "Codestral, Mistral": ("[PREFIX]", "</s>", 1.0, " "),
    "SantaCoder, Granite": ("<fim-prefix>", "<|endoftext|>", 0.5, ""),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_recognised_by_their_tokens(name):
    family = FAMILIES[name]
    first, end, spm_rate, space = PUBLISHED[name]
    tokenizer = Vocabulary(end, *reversed(family.tokens))
    fim = make_fim(tokenizer, 1.0)
    assert fim.family is family
    assert (family.tokens[0], family.end, fim.spm_rate) == (first, end, spm_rate)
    assert fim_family(tokenizer, ",".join(family.tokens)) is family
    if family.without_middle:
        with pytest.raises(InputError, match=r"--fim-spm-rate 0.25: models with \[SUFFIX\] have SPM alone"):
            make_fim(tokenizer, 1.0, spm_rate=0.25)
        return
    assert make_fim(tokenizer, 1.0, spm_rate=0.25).spm_rate == 0.25
    segments = Fim(1.0, 0.0, family, 1).segments(document("abc"), b"")
    assert segments[0] == Segment(first, True, True, begins=True)
    assert segments[1].text.startswith(space)
    assert segments[1].text.strip() in "abc"
    assert segments[-1] == Segment(end, True, True)
    with pytest.raises(InputError, match="--fim-tokens PREFIX,SUFFIX,MIDDLE"):
        fim_family(Vocabulary(*family.tokens[:2]))


@pytest.mark.parametrize("name", FAMILIES)
def test_without_the_family_s_end_token_a_middle_ends_with_the_end_of_text(name):
    family = fim_family(Vocabulary(*FAMILIES[name].tokens))
    assert (family.tokens, family.end) == (FAMILIES[name].tokens, END)


def test_tokens_of_the_option():
    code_llama = FAMILIES["CodeLlama"]
    tokenizer = Vocabulary(P, S, M, *FAMILIES["StarCoder"].tokens, plain=("a", "def", *code_llama.tokens, "▁<EOT>"))
    # a SentencePiece model does not tell that these tokens were added
    assert fim_family(tokenizer, ",".join(code_llama.tokens)) == code_llama
    assert fim_family(tokenizer, "<P>,<S>,<M>") == FAMILY
    for option_value, message in [
        ("<P>,<S>", "three different"),
        ("<P>,<S>,<P>", "three different"),
        ("<P>,<S>,<M>,<E>", "three different"),
        ("<P>,<S>,", "no token ''"),
        ("<P>,<S>,<X>", "no token '<X>'"),
        ("a,<S>,<M>", "'a' is ordinary text"),
        ("<P>,<S>,def", "'def' is ordinary text"),
    ]:
        with pytest.raises(InputError, match=f"--fim-tokens {option_value}: .*{message}"):
            fim_family(tokenizer, option_value)


def test_options():
    tokenizer = Vocabulary(P, S, M)
    assert make_fim(tokenizer, 0.5, 0.25, "<P>,<S>,<M>", 9) == Fim(0.5, 0.25, FAMILY, 9)
    for rates, option in (
        ((1.5, 0.5), "--fim-rate 1.5"),
        ((0.5, -0.1), "--fim-spm-rate -0.1"),
        ((float("nan"),), "nan"),
    ):
        with pytest.raises(InputError, match=option):
            make_fim(tokenizer, *rates, tokens="<P>,<S>,<M>")

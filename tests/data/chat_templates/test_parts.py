"""``--supervise no-thinking``, ``no-tool-calls``, ``tool-calls-only``: which parts of answers are context."""

import dataclasses
import itertools

import numpy as np
import pytest

from mft_megatron.data.chat_templates.formats import chat_format
from mft_megatron.data.preprocessing.batched_texts import BatchedSamples, KnownTexts
from mft_megatron.data.records.conversation import Conversation, RecordError, Turn
from mft_megatron.data.records.segments import LEFT_OUT, PARTS
from mft_megatron.data.tokenizers.load import load_tokenizer
from tests.data.chat_templates.segment_text import supervised_text
from tests.data.chat_templates.templates import TEMPLATES, save_tokenizer

# writes the channels of an answer as turns of their own; the thinking ends with another token
CHANNELS = """{%- for m in messages %}
{%- if m.role == 'assistant' %}
    {{- '<|im_start|>assistant' }}{% if m.reasoning_content %}{{- '<think>' + m.reasoning_content + '<|end|>' }}
    {{- '<|im_start|>assistant' }}{% endif %}{{- '<|user|>' + m.content + '<|im_end|>' }}
{%- else %}{{- '<|im_start|>' + m.role + '<|user|>' + m.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"""
# reads the thinking at the beginning of the content, and writes it with other line breaks before content and calls
MOVES = """{%- for m in messages %}
{%- if m.role == 'assistant' %}{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}
    {{- '<|im_start|>assistant' }}
    {%- if '</think>' in m.content %}
        {{- '<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in m.tool_calls or [] %}{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor %}
    {{- '<|im_end|>' }}
{%- else %}{{- '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"""
CALL = {"name": "add", "arguments": {"a": 1}}
WRITTEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("HuggingFaceTokenizer", save_tokenizer(tmp_path_factory.mktemp("tokenizers") / "plain"))


@pytest.fixture(scope="module")
def style_of(tokenizer, tmp_path_factory):
    """A function that makes a format, built in or of a template, with a value of ``--supervise``."""
    folder = tmp_path_factory.mktemp("templates")

    def style_of(name, supervise):
        text = {**TEMPLATES, "channels": CHANNELS, "moves": MOVES}.get(name)
        path = folder / f"{name}.jinja"
        if text is not None:
            path.write_text(text)
        return chat_format(name if text is None else str(path), tokenizer, supervise=supervise)

    return style_of


def asked(content, reasoning=None, calls=(), **options):
    extra = {} if reasoning is None else {"reasoning_content": reasoning}
    return Turn("user", "Q"), Turn("assistant", content, tool_calls=calls, extra=extra, **options)


THINKS = [
    # what the template marks itself, or the thinking it leaves out of earlier rounds
    ("qwen3", (*asked("A", "r"), *asked("B\n", "s")), "A<|im_end|>B\n<|im_end|>"),
    ("qwen3", asked("A"), "A<|im_end|>"),
    ("qwen3", asked("<think>\nr\n</think>\n\nA"), "A<|im_end|>"),
    ("qwen3", (*asked("", "r"), *asked("B")), "B<|im_end|>"),
    ("thinking", (*asked("A", "r"), *asked("B", "s")), "A<|im_end|>B<|im_end|>"),
    ("thinking", asked("r</think>A"), "A<|im_end|>"),
    ("parted", (*asked("A", "r"), *asked("B", "s")), "A<|im_end|>B<|im_end|>"),
    ("channels", (*asked("A", "r"), *asked("B")), "<|im_start|>assistant<|user|>A<|im_end|><|user|>B<|im_end|>"),
    # in the content, where a template knows no reasoning
    *(
        (name, (*asked("<think>\nr\n</think>\n\nA"), *asked("B")), f"A{stop}B{stop}")
        for stop, names in {
            "<|im_end|>": ("chatml", "tagged"),
            "</s>": ("mftcoder",),
            "<|eot_id|>": ("llama3",),
        }.items()
        for name in names
    ),
    ("chatml", (*asked("<think>endless"), *asked("B")), "B<|im_end|>"),
    ("chatml", asked("It ends with </think>."), "It ends with </think>.<|im_end|>"),
    ("qwen2", asked("<think>r</think>\n    x = 1", None), "    x = 1<|im_end|>"),
    ("qwen2", asked("<think>r</think>", None, (CALL,)), f"{WRITTEN}<|im_end|>"),
]


@pytest.mark.parametrize(("name", "turns", "expected"), THINKS)
def test_reasoning_and_its_marks_are_context(style_of, name, turns, expected):
    assert supervised_text(style_of(name, "no-thinking").segments(Conversation(turns))) == expected


CALLING = (
    *asked("So.", None, (CALL, CALL)),
    Turn("tool", "2"),
    Turn("assistant", "2."),
    *asked("", None, (CALL,)),
)


@pytest.mark.parametrize(("name", "stop"), [("chatml", "<|im_end|>"), ("mftcoder", "</s>"), ("qwen2", "<|im_end|>")])
def test_calls_and_the_token_that_ends_them_are_context_or_alone_learnt(style_of, name, stop):
    without = style_of(name, "no-tool-calls").segments(Conversation(CALLING))
    assert supervised_text(without) == f"So.\n2.{stop}"
    alone = style_of(name, "tool-calls-only").segments(Conversation(CALLING))
    assert supervised_text(alone) == f"{WRITTEN}\n{WRITTEN}{stop}{WRITTEN}{stop}"


def test_calls_are_found_after_reasoning_that_the_template_writes_in_another_way(style_of):
    chat = Conversation(asked("<think>r</think>So.", None, (CALL,)))
    written = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    parts = {"no-thinking": f"So.{written}", "no-tool-calls": "<think>\nr\n</think>\n\nSo.", "tool-calls-only": written}
    for supervise, expected in parts.items():
        assert supervised_text(style_of("moves", supervise).segments(chat)) == expected


def arrays_of(tokenizer, segments):
    samples = BatchedSamples(KnownTexts(tokenizer))
    samples.add(segments)
    return samples.arrays(None)


TEXTS = ["A", "def f(x):\n    return x\n", " é漢", "<think>r.</think>x", "<think>\n\n</think>\n\n- a\n", "..."]


@pytest.mark.parametrize("name", ["chatml", "mftcoder", "qwen2", "qwen3", "thinking", "tagged"])
@pytest.mark.parametrize("supervise", PARTS)
def test_tokens_are_the_same_whatever_is_supervised(style_of, tokenizer, name, supervise):
    calls = () if name in ("qwen3", "thinking", "tagged") else (CALL,)
    compared = 0
    for text in TEXTS:
        turns = asked(text, None, calls)
        whole = arrays_of(tokenizer, style_of(name, "all").segments(Conversation(turns)))
        if supervise == "tool-calls-only" and not calls:
            continue
        part = arrays_of(tokenizer, style_of(name, supervise).segments(Conversation(turns)))
        compared += 1
        assert np.array_equal(part.ids, whole.ids)
        assert (part.mask <= whole.mask).all()
        thinks = "<think>" in text or name in ("qwen3", "thinking")
        assert (part.mask < whole.mask).any() == (thinks if supervise == "no-thinking" else bool(calls))
    assert compared or not calls


def test_a_token_that_crosses_a_border_is_context(tokenizer):
    """Borders within a word: the tokens are those of the whole text, and only whole ones are supervised."""
    style = chat_format("chatml", tokenizer)
    segments = style.segments(Conversation(asked("def returned(x): return x")))
    index = next(index for index, segment in enumerate(segments) if segment.supervised and not segment.special)
    whole = arrays_of(tokenizer, segments)
    text = segments[index].text
    crossed = 0
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            parts = [(text[:start], False), (text[start:end], True), (text[end:], False)]
            cut = [segments[index]._replace(text=part, context=context) for part, context in parts if part]
            found = arrays_of(tokenizer, [*segments[:index], *cut, *segments[index + 1 :]])
            assert np.array_equal(found.ids, whole.ids)
            # characters of each token
            first = int(np.argmax(whole.mask))
            ids = whole.ids[first:].tolist()
            borders = [len(tokenizer.decode(ids[:count])) for count in range(len(ids))]
            between_words = all(text[border : border + 1] in ("", " ") or not border for border in (start, end))
            for token, (begins, ends) in enumerate(itertools.pairwise(borders), first):
                outside = ends <= start or begins >= end
                crossed += not outside and not (start <= begins and ends <= end)
                assert found.mask[token] <= outside, (start, end, token)
                assert found.mask[token] == outside or not between_words, (start, end, token)
    assert crossed


@pytest.mark.parametrize(
    ("name", "supervise", "turns", "reason"),
    [
        ("chatml", "no-thinking", asked("<think>r</think>"), LEFT_OUT),
        ("qwen3", "no-thinking", asked("", "r"), LEFT_OUT),
        ("chatml", "no-tool-calls", asked("", None, (CALL,)), LEFT_OUT),
        ("chatml", "tool-calls-only", asked("A"), LEFT_OUT),
        ("chatml", "no-tool-calls", (*asked("call f"), Turn("tool", "1"), Turn("assistant", "A")), "calls_in_text"),
        ("qwen2", "tool-calls-only", (*asked("call f"), Turn("tool", "1"), Turn("assistant", "A")), "calls_in_text"),
        ("chatml", "no-thinking", asked("A", "r"), "reasoning_has_no_place"),
    ],
)
def test_records_without_a_part_are_left_out_and_uncertain_ones_refused(style_of, name, supervise, turns, reason):
    with pytest.raises(RecordError) as error:
        style_of(name, supervise).segments(Conversation(turns))
    assert error.value.reason == reason


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_raw_text_has_no_parts(style_of, name):
    raw = Conversation((Turn("prompt", "p"), Turn("completion", "c")), raw=True)
    assert supervised_text(style_of(name, "no-tool-calls").segments(raw)) == "c</s>"
    assert supervised_text(style_of(name, "no-thinking").segments(raw)) == "c</s>"
    with pytest.raises(RecordError) as error:
        style_of(name, "tool-calls-only").segments(raw)
    assert error.value.reason == LEFT_OUT
    thinks = Conversation((Turn("prompt", "p"), Turn("completion", "<think>r</think>c")), raw=True)
    with pytest.raises(RecordError, match="raw text has no marks of reasoning"):
        style_of(name, "no-thinking").segments(thinks)


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["chatml", "mftcoder", *TEMPLATES])
@pytest.mark.parametrize("weights", [(0.25, 3), (2, 2), (0, 0.5), (1, 1)])
def test_each_turn_has_its_weight_with_the_token_that_ends_it(style_of, tokenizer, name, weights):
    pairs = zip(("Ya", "Me"), weights, strict=True)
    turns = [turn for text, weight in pairs for turn in asked(text, learn=weight > 0, weight=weight or 1)]
    style = style_of(name, "all")
    plain = style.segments(Conversation(tuple(dataclasses.replace(turn, weight=1.0) for turn in turns)))
    segments = style.segments(Conversation(tuple(turns)))
    found, expected = arrays_of(tokenizer, segments), arrays_of(tokenizer, plain)
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.mask, expected.mask)
    # runs of supervised tokens are the answers in their order
    starts = np.flatnonzero(np.diff(expected.mask, prepend=np.uint8(0)) == 1)
    reference = expected.mask.astype(np.float32)
    learnt = [weight for weight in weights if weight]
    assert len(starts) == len(learnt)
    for start, weight in zip(starts, learnt, strict=True):
        end = start
        while end < len(reference) and expected.mask[end]:
            reference[end] = weight
            end += 1
    assert (found.weights is None) == (weights == (1, 1))
    if found.weights is not None:
        assert np.array_equal(found.weights, reference)

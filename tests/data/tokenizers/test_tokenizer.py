"""Tokenizers of each kind: segments decode to their text, and content never becomes a control token."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.errors import InputError

TORTURE = [
    "",
    " ",
    "  x",
    "x  ",
    "\n",
    "\n\n\n",
    "\t\tif x:\r\n\t  pass\r",
    "def f(x):\n    return x\n\n\n",
    "é漢字🙂👩‍👩‍👧‍👦",
    "e\u0301 vs \u00e9, ﬁ, ①, Å",
    "\u0000\u0001\u007f\ufeff\u200b\u2028\u3000\u00a0",
    "<s></s><unk><|im_end|><|endoftext|>",
    "< s >< / s >",
    "a" * 1000,
    " " * 100 + "x",
    "<0x0A>",
    "\U0010ffff\ue000",
    "''\"\"\\\\%s{}$`",
    "١٢٣ हिन्दी ไทย עברית",
]


@pytest.mark.parametrize("text", TORTURE, ids=range(len(TORTURE)))
@pytest.mark.parametrize("markup", [False, True])
def test_text_survives(tokenizer, text, markup):
    (ids,) = tokenizer.encode_batch([text], markup=markup)
    assert tokenizer.decode(ids) == text
    assert all(0 <= number < tokenizer.vocab_size for number in ids)


# U+2581 is how these tokenizers write a space, so they cannot tell the two apart
segment = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=8) | st.sampled_from(
    TORTURE
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(segment, max_size=5))
def test_the_ids_of_segments_decode_to_the_whole_text(tokenizer, segments):
    ids = [token_id for segment_ids in tokenizer.encode_batch(segments) for token_id in segment_ids]
    assert tokenizer.decode(ids) == "".join(segments)


def test_the_end_of_text_comes_from_markup_only(tokenizer):
    name, number = tokenizer.end_of_text, tokenizer.eos_token_id
    assert tokenizer.token_id(name) == number
    (ids,) = tokenizer.encode_batch([f"a{name}b"])
    assert number not in ids
    (ids,) = tokenizer.encode_batch([f"a{name}b"], markup=True)
    assert ids.count(number) == 1
    assert tokenizer.decode(ids) == f"a{name}b"


def test_nothing_is_added(tokenizer):
    assert tokenizer.encode_batch(["", ""]) == [[], []]


def test_unknown_names_have_no_id(tokenizer):
    assert tokenizer.token_id("<|no such token|>") is None


def test_hugging_face_ids_are_those_of_transformers(tokenizer_folder):
    from transformers import AutoTokenizer

    ours, theirs = (
        load_tokenizer("HuggingFaceTokenizer", tokenizer_folder),
        AutoTokenizer.from_pretrained(tokenizer_folder),
    )
    for text in TORTURE:
        assert ours.encode_batch([text], markup=True)[0] == theirs(text, add_special_tokens=False).input_ids
    assert ours.vocab_size == len(theirs)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_padding_falls_back_to_the_end_of_text(llama_like_folder, sentencepiece_model):
    for kind, model in (("HuggingFaceTokenizer", llama_like_folder), ("SentencePieceTokenizer", sentencepiece_model)):
        opened = load_tokenizer(kind, model)
        assert opened.pad_token_id == opened.eos_token_id == opened.token_id("</s>")
        assert opened.bos_token_id == opened.token_id("<s>")


def test_truncation_and_padding_of_the_file_are_ignored(tokenizer_folder, tmp_path):
    from tokenizers import Tokenizer

    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    cut = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cut.enable_truncation(3)
    cut.enable_padding(length=16)
    cut.save(str(folder / "tokenizer.json"))
    texts = ["a", "def f(x): return x"]
    plain = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder).encode_batch(texts)
    assert load_tokenizer("HuggingFaceTokenizer", folder).encode_batch(texts) == plain


def test_the_fingerprint_is_of_content(tokenizer_folder, tmp_path):
    def fingerprint(folder):
        return load_tokenizer("HuggingFaceTokenizer", folder).fingerprint

    folder = shutil.copytree(tokenizer_folder, tmp_path / "elsewhere")
    before = fingerprint(tokenizer_folder)
    assert fingerprint(folder) == fingerprint(folder / "tokenizer.json") == before
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|pad|>"}))
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("HuggingFaceTokenizer", "nothing", None, "no such file or folder"),
        ("HuggingFaceTokenizer", "tokenizer.json", "{}", "not a tokenizer"),
        ("HuggingFaceTokenizer", "tokenizer.json", "{", "not a tokenizer"),
        ("SentencePieceTokenizer", "nothing", None, "no such file"),
        ("SentencePieceTokenizer", "a.model", "not a model", "not a SentencePiece model"),
        ("SentencePieceTokenizer", "a.model", "", "not a SentencePiece model"),
    ],
)
def test_bad_tokenizers_are_refused(tmp_path, kind, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        load_tokenizer(kind, path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"eos_token": "unheard of"}'])
def test_a_tokenizer_without_an_end_of_text_is_refused(tokenizer_folder, tmp_path, content):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        _ = load_tokenizer("HuggingFaceTokenizer", folder).eos_token_id


def test_a_model_that_loses_line_breaks_is_refused(train_sentencepiece):
    with pytest.raises(InputError, match=r"loses line breaks.*nmt_nfkc.*identity"):
        load_tokenizer("SentencePieceTokenizer", train_sentencepiece(normalization_rule_name="nmt_nfkc"))


# ------------------------------------------------------------------------------------------ properties for chat formats


def test_names_of_special_tokens_become_tokens_in_markup(tokenizer):
    special = tokenizer.special_tokens
    assert special[tokenizer.end_of_text] == (tokenizer.eos_token_id, False, False)
    for name, token in special.items():
        assert tokenizer.token_id(name) == token.id
        assert tokenizer.encode_batch([f"a{name}b"], markup=True)[0].count(token.id) == 1


def test_tokens_that_absorb_whitespace_are_marked(tokenizer_folder, tmp_path):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][0].update(lstrip=True)
    content["added_tokens"][1].update(rstrip=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    stripping = load_tokenizer("HuggingFaceTokenizer", folder).special_tokens
    assert [(token.lstrip, token.rstrip) for token in stripping.values()][:2] == [(True, False), (False, True)]


def test_the_name_of_the_bos_token(tokenizer_folder, llama_like_folder, sentencepiece_model):
    assert load_tokenizer("HuggingFaceTokenizer", tokenizer_folder).bos_token is None
    for kind, model in (("HuggingFaceTokenizer", llama_like_folder), ("SentencePieceTokenizer", sentencepiece_model)):
        assert load_tokenizer(kind, model).bos_token == "<s>"


@pytest.mark.parametrize(
    ("config", "jinja", "expected"),
    [
        ({}, None, None),
        ({"chat_template": "{{ a }}"}, None, "{{ a }}"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, None, "d"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}]}, None, None),
        ({"chat_template": "old"}, "new é\n", "new é\n"),
        (None, "alone", "alone"),
    ],
)
@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_the_chat_template(tokenizer_folder, sentencepiece_model, tmp_path, kind, config, jinja, expected):
    if kind == "HuggingFaceTokenizer":
        model = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    else:
        model = shutil.copy(sentencepiece_model, tmp_path)
    folder = tmp_path / "copy" if kind == "HuggingFaceTokenizer" else tmp_path
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    assert load_tokenizer(kind, model).chat_template == expected


def test_a_chat_template_that_is_no_text_is_refused(tokenizer_folder, tmp_path):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    (folder / "tokenizer_config.json").write_text('{"chat_template": {"default": 1}}')
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template is no text"):
        _ = load_tokenizer("HuggingFaceTokenizer", folder).chat_template
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"chat_template\.jinja: not UTF-8"):
        _ = load_tokenizer("HuggingFaceTokenizer", folder).chat_template


@pytest.mark.parametrize("names", [("model",), ("decoder", "model"), ("model", "normalizer")])
@pytest.mark.parametrize("backend", ["reference", "gigatoken"])
def test_the_order_of_the_members_of_tokenizer_json_changes_nothing(llama_like_folder, tmp_path, names, backend):
    """The vocabulary is not read twice where it stands at the end; other programs may write it elsewhere."""
    shutil.copytree(llama_like_folder, tmp_path / "other")
    content = json.loads((tmp_path / "other/tokenizer.json").read_text())
    content = {name: content[name] for name in (*names, *(name for name in content if name not in names))}
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(content))
    texts = ["def f(x):\n    return  x", " a", "é\n\n"]
    one, other = (
        load_tokenizer("HuggingFaceTokenizer", path, backend) for path in (llama_like_folder, tmp_path / "other")
    )
    for ids, same in zip(one.encode_arrays(texts), other.encode_arrays(texts), strict=True):
        assert ids.tolist() == same.tolist()
    assert other.decode(other.encode_batch(texts)[1]) == " a"

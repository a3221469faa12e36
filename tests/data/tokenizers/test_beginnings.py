"""Raw samples begin with the ids that the tokenizer's own ``encode`` gives, as transformers opens the tokenizer."""

import json
import shutil

import pytest

from mft_megatron.data.chat_templates.formats import chat_format
from mft_megatron.data.preprocessing.encoding import Encoder, TaskEncoding
from mft_megatron.data.records.fim import make_fim
from mft_megatron.data.records.record_formats import read_record
from mft_megatron.data.tasks.record_batches import RecordBatch
from mft_megatron.data.tokenizers.load import load_tokenizer
from tests import source_code

METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
BOS_AND_EOS = {
    **BOS,
    "single": [*BOS["single"], {"SpecialToken": {"id": "</s>", "type_id": 0}}],
    "special_tokens": {**BOS["special_tokens"], "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
}
NO_NORMALIZER = {"normalizer": None}
SPACES_ALONE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}

# changes of a tokenizer.json like that of Llama 2, and its tokenizer_config.json
FOLDERS = {
    "as it is": ({}, {}),
    "with BOS": ({"post_processor": BOS}, {}),
    "with BOS and EOS": ({"post_processor": BOS_AND_EOS}, {}),
    "first": ({**NO_NORMALIZER, "pre_tokenizer": {**METASPACE, "prepend_scheme": "first"}, "post_processor": BOS}, {}),
    "always": ({**NO_NORMALIZER, "pre_tokenizer": {**METASPACE, "prepend_scheme": "always"}}, {}),
    "never": ({**NO_NORMALIZER, "pre_tokenizer": {**METASPACE, "prepend_scheme": "never"}}, {}),
    "Llama": ({"post_processor": BOS}, {"tokenizer_class": "LlamaTokenizerFast"}),
    "Llama, legacy": ({"post_processor": BOS}, {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "Llama, not legacy": ({"post_processor": BOS}, {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "Llama, no space": ({"post_processor": BOS}, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}),
    "Llama, no BOS": ({}, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}),
    "Gemma": ({"normalizer": SPACES_ALONE, "post_processor": BOS}, {"tokenizer_class": "GemmaTokenizerFast"}),
    "CodeLlama": ({"post_processor": BOS}, {"tokenizer_class": "CodeLlamaTokenizer", "legacy": True}),
    "CodeLlama, BOS by its class": ({}, {"tokenizer_class": "CodeLlamaTokenizerFast"}),
}
TEXTS = (
    *("def f(x):\n    return x\n", "    return x\n", " x", "\n\nx", "\tx", "x", "▁x", "é漢🙂", "\u00a0x"),
    *("<s>def f", "x</s>y", "x </s> y</s>", "</s>", " <s>x", "1"),
)


def opened(folder, **config):
    """Open a folder with ours and with transformers."""
    from transformers import AutoTokenizer

    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(base | config))
    return AutoTokenizer.from_pretrained(folder)


def first_ids(tokenizer, *records):
    """Ids of each record up to its first supervised token, or of all of a text without the end of text."""
    encoder = Encoder(tokenizer, {"task": TaskEncoding(chat_format("mftcoder", tokenizer))})
    encoded = encoder.encode("task", RecordBatch("file", 1, [json.dumps(record).encode() for record in records]))
    assert not encoded.drops
    ids = []
    ends = encoded.lengths.cumsum().tolist()
    for record, start, end in zip(records, [0, *ends], ends, strict=False):
        learned = encoded.mask[start:end].tolist().index(1)
        stop = end - 1 if "text" in record else start + learned
        ids.append(encoded.ids[start:stop].tolist())
    return ids


@pytest.fixture(scope="module", params=FOLDERS)
def both(request, llama_like_folder, tmp_path_factory):
    """A folder opened by ours and by transformers, and whether it puts EOS after texts."""
    changes, config = FOLDERS[request.param]
    content = json.loads((llama_like_folder / "tokenizer.json").read_text())
    folder = tmp_path_factory.mktemp("variant")
    (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    theirs = opened(folder, **config)
    return load_tokenizer("HuggingFaceTokenizer", folder, "auto"), theirs, "EOS" in request.param


def test_raw_prompts_begin_as_transformers_encodes_them(both):
    ours, theirs, ends = both
    records = [{"prompt": text, "completion": "def"} for text in TEXTS]
    expected = [theirs.encode(text) for text in TEXTS]
    assert first_ids(ours, *records) == [ids[:-1] if ends else ids for ids in expected]


def test_documents_and_completions_without_prompt_begin_as_transformers_encodes_them(both):
    ours, theirs, ends = both
    texts = [text for text in TEXTS if "<" not in text]  # in documents names of tokens are text
    expected = [theirs.encode(text)[: -1 if ends else None] for text in texts]
    assert first_ids(ours, *({"text": text} for text in texts)) == expected
    encoder = Encoder(ours, {"task": TaskEncoding(chat_format("mftcoder", ours))})
    for text, ids in zip(texts, expected, strict=True):
        line = json.dumps({"prompt": "", "completion": text}).encode()
        encoded = encoder.encode("task", RecordBatch("file", 1, [line]))
        assert encoded.ids.tolist() == [*ids, ours.eos_token_id]
        before = len(ours.beginning.ids)
        assert encoded.mask.tolist() == [0] * before + [1] * (len(ids) - before + 1)


def test_the_completion_is_encoded_without_a_space(both):
    """Prompt and completion stay apart: the ids of the completion do not depend on the prompt."""
    ours, _, _ = both
    encoder = Encoder(ours, {"task": TaskEncoding(chat_format("mftcoder", ours))})
    lines = [json.dumps({"prompt": text, "completion": "return x"}).encode() for text in TEXTS]
    encoded = encoder.encode("task", RecordBatch("file", 1, lines))
    (plain,) = ours.encode_batch(["return x"])
    for end in encoded.lengths.cumsum().tolist():
        assert encoded.ids[end - len(plain) - 1 : end - 1].tolist() == plain


CHATS = [
    # markers that begin with a token, and markers that are text alone
    ({}, "<s>human\n{}\n<s>bot\n"),
    ({"user": "USER: ", "assistant": "ASSISTANT: "}, "USER: {}\nASSISTANT: "),
    ({"user": "</s> USER: ", "assistant": "</s>ASSISTANT: "}, "</s> USER: {}\n</s>ASSISTANT: "),
]


@pytest.mark.parametrize("add_bos", [False, True])
def test_prompts_of_chats_are_those_of_transformers(both, add_bos):
    """A server renders the prompt and tokenises it without BOS, which is the template's part."""
    ours, theirs, _ = both
    (answer,) = ours.encode_batch(["return x"])
    for markers, prompt in CHATS:
        encoding = TaskEncoding(chat_format("mftcoder", ours, json.dumps(markers)), add_bos=add_bos)
        encoder = Encoder(ours, {"task": encoding})
        if add_bos and not prompt.startswith("<s>"):
            prompt = f"<s>{prompt}"
        for question in ("def f(x):", "  x", "\n\n", "漢"):
            record = json.dumps({"question": question, "answer": "return x"}).encode()
            encoded = encoder.encode("task", RecordBatch("file", 1, [record]))
            learned = int(encoded.mask.argmax())
            assert encoded.ids[:learned].tolist() == theirs.encode(prompt.format(question), add_special_tokens=False)
            assert encoded.ids[learned : learned + len(answer) + 1].tolist() == [*answer, ours.eos_token_id]


def test_the_bos_option_adds_no_second_one(both):
    ours, _, _ = both
    records = [{"prompt": "def", "completion": "x"}, {"text": "def"}]
    lines = [json.dumps(record).encode() for record in records]
    encoder = Encoder(ours, {"task": TaskEncoding(chat_format("mftcoder", ours), add_bos=True)})
    encoded = encoder.encode("task", RecordBatch("file", 1, lines))
    for start, length in zip(encoded.lengths.cumsum() - encoded.lengths, encoded.lengths, strict=True):
        ids = encoded.ids[start : start + length].tolist()
        assert ids[0] == 1
        assert ids.count(1) == 1


@pytest.mark.parametrize("add_prefix_space", [False, True])
@pytest.mark.parametrize("bos", [None, "<|endoftext|>"])
def test_byte_level_tokenizers(tokenizer_folder, tmp_path, add_prefix_space, bos):
    """Without BOS and space, as in most of these tokenizers, raw samples are encoded as any other text."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = add_prefix_space
    if bos is not None:
        content["post_processor"] = json.loads(json.dumps(BOS).replace("<s>", bos).replace('"ids": [1]', '"ids": [0]'))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    theirs = opened(folder, bos_token=bos, eos_token="<|endoftext|>", unk_token=None)
    ours = load_tokenizer("HuggingFaceTokenizer", folder)
    texts = [text.replace("</s>", "<|im_end|>") for text in TEXTS]
    ids = first_ids(ours, *({"prompt": text, "completion": "def"} for text in texts))
    assert ids == [theirs.encode(text) for text in texts]
    if bos is None and not add_prefix_space:
        assert ids == ours.encode_batch(texts, markup=True)


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_prefix_space": False},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True},
        {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True},
        {"tokenizer_class": "CodeLlamaTokenizer"},
    ],
)
def test_sentencepiece_models_beside_a_configuration(train_sentencepiece, tmp_path, config):
    model = train_sentencepiece(normalization_rule_name="identity")
    gemma = config["tokenizer_class"] == "GemmaTokenizer"  # whose models write no space
    shutil.copy(_without_prefix(model) if gemma else model, tmp_path / "tokenizer.model")
    theirs = opened(tmp_path, **config)
    ours = load_tokenizer("SentencePieceTokenizer", tmp_path, "auto")
    ids = first_ids(ours, *({"prompt": text, "completion": "def"} for text in TEXTS))
    assert ids == [theirs.encode(text) for text in TEXTS]


def test_a_sentencepiece_model_alone_begins_as_the_library_does(train_sentencepiece):
    import sentencepiece

    model = train_sentencepiece(normalization_rule_name="identity", remove_extra_whitespaces=False)
    for prefix, file in ((True, model), (False, _without_prefix(model))):
        library = sentencepiece.SentencePieceProcessor(model_file=str(file))
        ours = load_tokenizer("SentencePieceTokenizer", file, "auto")
        texts = [text for text in TEXTS if "<" not in text]
        ids = first_ids(ours, *({"prompt": text, "completion": "def"} for text in texts))
        assert ids == library.encode(texts)
        assert (ids == ours.encode_batch(texts)) == (not prefix)


def _without_prefix(model):
    from sentencepiece import sentencepiece_model_pb2

    content = sentencepiece_model_pb2.ModelProto()
    content.ParseFromString(model.read_bytes())
    content.normalizer_spec.add_dummy_prefix = False
    other = model.with_name("no_prefix.model")
    other.write_bytes(content.SerializeToString())
    return other


def test_prompts_that_begin_with_bos_are_counted(both):
    ours, _, _ = both
    encoder = Encoder(ours, {"task": TaskEncoding(chat_format("mftcoder", ours))})
    prompts = ["<s>def", "def", "def<s>", "<s>"]
    lines = [json.dumps({"prompt": prompt, "completion": "x"}).encode() for prompt in prompts]
    lines += [b'{"text": "<s>def"}', b'{"question": "<s>", "answer": "x"}']
    noted = encoder.encode("task", RecordBatch("file", 1, lines)).notes.kinds
    # in the document and in the question it is text here and a token to a server
    assert noted == {"token_names": 2} | ({"two_bos": 2} if 1 in ours.beginning.ids else {})


CODE_LLAMA = ("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "<FILL_ME>")


@pytest.fixture(params=["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def code_llama(request, llama_like_folder, train_sentencepiece, tmp_path):
    """A tokenizer like that of CodeLlama, opened by ours and by transformers."""
    if request.param == "HuggingFaceTokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(llama_like_folder / "tokenizer.json"))
        tokenizer.add_special_tokens(list(CODE_LLAMA))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    else:
        model = train_sentencepiece(normalization_rule_name="identity", control_symbols=list(CODE_LLAMA))
        shutil.copy(model, tmp_path / "tokenizer.model")
    theirs = opened(tmp_path, tokenizer_class="CodeLlamaTokenizer", fill_token=None)
    # this class encodes a suffix without a space, as Meta's own does; under some releases its pre-tokenizer adds one
    theirs._tokenizer.pre_tokenizer.prepend_scheme = "never"
    return load_tokenizer(request.param, tmp_path, "auto"), theirs


@pytest.mark.parametrize("spm", [False, True])
def test_documents_are_filled_in_as_code_llama_s_tokenizer_does(code_llama, spm):
    ours, theirs = code_llama
    fim = make_fim(ours, 1.0, float(spm))
    encoder = Encoder(ours, {"task": TaskEncoding(chat_format("mftcoder", ours), fim=fim)})
    compared = 0
    for text in source_code.functions(seed=3, count=40):
        encoded = encoder.encode("task", RecordBatch("file", 1, [json.dumps({"text": text}).encode()]))
        segments = fim.segments(read_record({"text": text}), text.encode())
        head, tail = (segments[4], segments[2]) if spm else (segments[1], segments[3])
        assert head.text[0] == " "
        (middle,) = ours.encode_batch([segments[-2].text])
        if tail.text:
            prompt = theirs(head.text[1:], suffix=tail.text, suffix_first=spm).input_ids
            assert encoded.ids.tolist() == [*prompt, *middle, ours.token_id("▁<EOT>")]
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("spm", [False, True])
def test_completions_are_filled_in_after_their_prompt(code_llama, spm):
    ours, _ = code_llama
    fim = make_fim(ours, 1.0, float(spm))
    encoder = Encoder(ours, {"task": TaskEncoding(chat_format("mftcoder", ours), fim=fim)})
    record = {"prompt": "def f(", "completion": "x):\n    return x\n"}
    # without a prompt the space belongs to the first word of the completion
    empty = read_record({"prompt": "", "completion": "xyz"})
    heads = {tuple(one.text for one in fim.segments(empty, b"%d" % key))[4 if spm else 1 :][:2] for key in range(20)}
    assert {prompt for prompt, _ in heads} == {""}
    assert {head[:1] for _, head in heads} == {" "}
    encoded = encoder.encode("task", RecordBatch("file", 1, [json.dumps(record).encode()]))
    texts = [segment.text for segment in fim.segments(read_record(record), "\0".join(record.values()).encode())]
    tail, prompt, head, middle = (texts[index] for index in ((2, 4, 5, -2) if spm else (4, 1, 2, -2)))
    assert (prompt, head + middle + tail) == (" def f(", record["completion"])
    tail, prompt, head, middle = ours.encode_batch([tail, prompt, head, middle])
    bos, pre, mid, suf, end = map(ours.token_id, ("<s>", *CODE_LLAMA[:4]))
    before = [bos, pre, suf, *tail, mid, *prompt, *head] if spm else [bos, pre, *prompt, *head, suf, *tail, mid]
    assert encoded.ids.tolist() == [*before, *middle, end]
    assert encoded.mask.tolist() == [0] * len(before) + [1] * (len(middle) + 1)


LLAMA = {"tokenizer_class": "LlamaTokenizer", "legacy": True}


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "CodeLlamaTokenizer"},
        {"tokenizer_class": "GemmaTokenizer"},
        {"legacy": False},
        {"add_prefix_space": False},
        {"add_bos_token": True},
    ],
)
def test_samples_that_begin_otherwise_are_of_another_key(
    llama_like_folder, sentencepiece_model, tmp_path, kind, change
):
    """Cached batches are found by the key, and parts of a data set are compared by it."""
    keys, samples = [], []
    for name, config in (("before", LLAMA), ("after", {**LLAMA, **change})):
        folder = shutil.copytree(llama_like_folder, tmp_path / name)
        shutil.copy(sentencepiece_model, folder / "tokenizer.model")
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        tokenizer = load_tokenizer(kind, folder)
        keys.append(tokenizer.encoding_key)
        samples.append(first_ids(tokenizer, *({"text": text} for text in ("x", " x", "</s>y"))))
        samples[-1] += first_ids(tokenizer, {"prompt": "a</s>b", "completion": "c"})
    # only the class of SentencePiece reads the last of these keys
    assert (samples[0] != samples[1]) == ("add_bos_token" not in change or kind == "SentencePieceTokenizer")
    assert keys[0] != keys[1] or samples[0] == samples[1]


MISTRAL = ("[PREFIX]", "[SUFFIX]", "[MIDDLE]")


@pytest.mark.parametrize("space", [True, False])
def test_mistral_s_models_have_the_suffix_first_and_no_middle_token(train_sentencepiece, tmp_path, space):
    """A text to fill in is BOS [SUFFIX] tail [PREFIX] head; the head alone begins as ``encode`` begins a text."""
    model = train_sentencepiece(normalization_rule_name="identity", control_symbols=list(MISTRAL))
    shutil.copy(model if space else _without_prefix(model), tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    ours = load_tokenizer("SentencePieceTokenizer", tmp_path)
    fim = make_fim(ours, 1.0)
    encoder = Encoder(ours, {"task": TaskEncoding(chat_format("mftcoder", ours), fim=fim)})
    prefix, suffix = map(ours.token_id, MISTRAL[:2])
    for text in source_code.functions(seed=3, count=20):
        encoded = encoder.encode("task", RecordBatch("file", 1, [json.dumps({"text": text}).encode()]))
        tail, head, middle = (fim.segments(read_record({"text": text}), text.encode())[n].text for n in (1, 3, -2))
        assert head.removeprefix(" " if space else "") + middle + tail == text
        tail, head, middle = ours.encode_batch([tail, head, middle])
        assert encoded.ids.tolist() == [1, suffix, *tail, prefix, *head, *middle, ours.eos_token_id]
    record = read_record({"prompt": "", "completion": "abc"})
    heads = {fim.segments(record, b"%d" % key)[4].text for key in range(20)}
    assert "" in heads  # an empty prefix has no space
    assert {head[:1] for head in heads - {""}} == ({" "} if space else {"a"})


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_tokenizers_of_one_model_and_one_key_begin_texts_alike(llama_like_folder, sentencepiece_model, tmp_path, kind):
    if kind == "HuggingFaceTokenizer":
        shutil.copy(llama_like_folder / "tokenizer.json", tmp_path)
    else:
        shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    found = {}
    for name in (None, "LlamaTokenizerFast", "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"):
        for key in (None, "legacy", "add_prefix_space", "add_bos_token"):
            for value in (None, False, True):
                config = {
                    "tokenizer_class": name,
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                    **({key: value} if key else {}),
                }
                (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
                ours = load_tokenizer(kind, tmp_path)
                begun = ours.beginning.ids.tolist(), ours._encode_own(list(TEXTS), True)
                found.setdefault(ours.encoding_key, []).append(begun)
    for begun in found.values():
        assert begun == [begun[0]] * len(begun)
    assert 4 <= len(found) <= 12  # of 60 configurations
    assert max(map(len, found.values())) >= 9

"""Tokenizers of a model and of a data set must give texts the same ids, and nothing more."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mft_megatron.data.tokenizers.differences import tokenizer_difference
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.run_folder.description import CheckpointRef
from mft_megatron.training.model_tokenizer import chat_format_line, check_model_tokenizer
from tests.refusals import refused_call


@pytest.fixture
def model(tokenizer_folder, tmp_path):
    """A copy of the data set's tokenizer, to be changed."""
    return shutil.copytree(tokenizer_folder, tmp_path / "model")


def change(folder, edit, **dumps):
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content, **dumps))


def check(model, data, *, run=None, tokenizer_model=None, kind="HuggingFaceTokenizer", **info):
    """Check as a run does whose data set was made with the tokenizer of the folder ``data``."""
    made_with = load_tokenizer(kind, data)
    entry = SimpleNamespace(type=kind, model=str(data), fingerprint=made_with.fingerprint)
    if tokenizer_model is not None:  # it has moved since
        entry.model = "/nowhere"
    known = SimpleNamespace(**{"dataset_hash": "", "tokenizer": {}, **info})
    path = model if run is None else run / "iter_0000000"
    arguments = SimpleNamespace(
        resume=CheckpointRef(path, known),
        base=None,
        starts_from_hf=run is None,
        reads_hf=run is None,
        data=SimpleNamespace(data_path="DATA", tokenizer_model=tokenizer_model),
    )
    ledger = SimpleNamespace(tokenizer=entry)
    return check_model_tokenizer(arguments, SimpleNamespace(dataset_hash="d", ledger=ledger))


OWN = "{{ messages }}"


@pytest.mark.parametrize(
    ("of_model", "recorded", "sources", "named"),
    [
        (OWN, None, ["{{ other }}"], True),
        (OWN, None, [OWN], False),
        (None, None, [OWN], False),
        (OWN, None, [], False),
        (OWN, None, None, False),
        (OWN, OWN, ["{{ other }}"], True),
        ("{{ unused }}", OWN, [OWN], False),
        (OWN, "{{ trained before }}", [OWN], True),
        ("\udcff", None, [OWN], False),  # damaged
    ],
)
def test_chats_in_another_format_than_the_model_s_are_named(tmp_path, of_model, recorded, sources, named):
    if of_model is not None:
        (tmp_path / "chat_template.jinja").write_text(of_model, errors="surrogateescape")
    tokenizer = {} if recorded is None else {"chat_template": {"name": "own", "source": recorded, "others": {}}}
    model = CheckpointRef(tmp_path, SimpleNamespace(dataset_hash="", tokenizer=tokenizer))
    arguments = SimpleNamespace(resume=model, base=None, starts_from_hf=True, data=SimpleNamespace(data_path="DATA"))
    listed = [{"name": "mftcoder", "source": source, "tasks": ["a"]} for source in sources or ()]
    template = {"name": "mftcoder"} if sources is None else {"name": "mftcoder", "sources": listed}
    ledger = SimpleNamespace(chat_template=template, tasks=[SimpleNamespace(name="a", chats=1, sources=[])])
    line = chat_format_line(arguments, SimpleNamespace(dataset_hash="d", ledger=ledger))
    expected = (
        f"the chats of DATA are written as mftcoder, and the model in {tmp_path} has another chat template; exports"
    )
    assert line.startswith(expected) if named else line == ""
    assert chat_format_line(arguments, SimpleNamespace(dataset_hash="", ledger=ledger)) == ""


def refusal(*folders, **others):
    return refused_call(check, *folders, **others)


def add_tokens(*names, special=True, start=500):
    def edit(content):
        for token_id, name in enumerate(names, start):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            content["added_tokens"].append({"id": token_id, "content": name, "special": special, **flags})

    return edit


def test_the_same_tokenizer_needs_no_line(model, tokenizer_folder):
    assert check(model, tokenizer_folder) == ""
    (model / "LICENSE").write_text("beside it")
    assert check(model, tokenizer_folder) == ""


def test_the_same_tokenizer_written_differently(model, tokenizer_folder):
    change(model, lambda content: content, indent=7)
    assert check(model, tokenizer_folder).endswith("with the same ids for texts")
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert check(model, tokenizer_folder).endswith("with the same ids for texts")


def test_special_tokens_may_be_added_and_renamed(model, tokenizer_folder, tmp_path):
    data = shutil.copytree(tokenizer_folder, tmp_path / "data")
    change(data, add_tokens("<|tool|>", "<|fim|>"))
    assert check(model, data).endswith("with the same ids for texts; it has more special tokens: <|fim|>, <|tool|>")
    change(data, lambda content: content["added_tokens"][3].update(content="<|turn|>"))
    change(
        data,
        lambda content: content["model"]["vocab"].update({"<|turn|>": content["model"]["vocab"].pop("<|im_end|>")}),
    )
    assert check(model, data).endswith("<|fim|>, <|tool|>, <|turn|>")
    # special tokens of the model that the data set does not use are ignored
    assert check(data, model).endswith("more special tokens: <|im_end|>")


def swap_two(content):
    vocabulary = content["model"]["vocab"]
    one, other = [name for name, token_id in vocabulary.items() if token_id in (300, 400)]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def lose_last_merge(content):
    content["model"]["merges"].pop()


def single_spaces(content):
    spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [spaces, content["pre_tokenizer"]]}


def lower(content):
    content["normalizer"] = {"type": "Lowercase"}


def move_special(content):
    content["added_tokens"][2]["content"], content["added_tokens"][3]["content"] = "<|im_end|>", "<|im_start|>"
    vocabulary = content["model"]["vocab"]
    vocabulary["<|im_end|>"], vocabulary["<|im_start|>"] = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (swap_two, " in the data. Preprocess the data with --tokenizer-type HuggingFaceTokenizer --tokenizer-model "),
        (lose_last_merge, " in the model and 499 in the data"),
        (single_spaces, "in the model and"),
        (lower, "in the model and"),
        (move_special, "<|im_end|> is 2 in the model and 3 in the data"),
        (add_tokens("return", special=False), " in the model and "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_ids_are_refused(model, tokenizer_folder, edit, words):
    change(model, edit)
    line = refusal(model, tokenizer_folder)
    assert words in line
    assert str(model) in line
    assert "DATA" in line
    assert "special tokens alone may be added" in line


def test_a_tokenizer_that_cannot_be_compared_is_named(model, tokenizer_folder):
    (model / "tokenizer.json").write_text("{}")
    assert "is not known: " in (line := check(model, tokenizer_folder))
    assert "not a tokenizer" in line
    (model / "tokenizer.json").unlink()
    assert check(model, tokenizer_folder).endswith(f"{model} has no tokenizer.json or tokenizer.model")


def test_a_data_set_whose_tokenizer_has_moved(model, tokenizer_folder, tmp_path):
    assert check(model, tokenizer_folder, tokenizer_model="/nowhere") == ""
    change(model, lambda content: content, indent=1)
    line = refusal(model, tokenizer_folder, tokenizer_model="/nowhere")
    assert "no longer at /nowhere" in line
    assert "give its path with --tokenizer-model" in line
    assert check(model, tokenizer_folder, tokenizer_model=tokenizer_folder).endswith("the same ids for texts")
    # or another tokenizer is there now
    assert f"no longer at {model}" in refusal(model, tokenizer_folder, tokenizer_model=model)


def test_a_converted_checkpoint_has_its_tokenizer_beside_it(model, tokenizer_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(model, run / "huggingface")
    assert check(None, tokenizer_folder, run=run) == ""
    change(run / "huggingface", swap_two)
    assert str(run / "huggingface") in refusal(None, tokenizer_folder, run=run)
    # a checkpoint that was trained since has the tokenizer of its data set; with the same data set there is no check
    fingerprint = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder).fingerprint
    assert check(None, tokenizer_folder, run=run, tokenizer={"fingerprint": fingerprint}) == ""
    assert "run/tokenizer has no" in check(None, tokenizer_folder, run=run, tokenizer={"fingerprint": "x"})
    assert check(None, tokenizer_folder, run=run, dataset_hash="d") == ""


def test_both_kinds_of_one_vocabulary(tmp_path):
    """A SentencePiece model, and the same vocabulary and rules as transformers write them."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path / "model"
    folder.mkdir()
    text = Path(__file__).read_text()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines(keepends=True)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocabulary = {pieces.id_to_piece(number): number for number in range(500)}
    splits = [
        (name[:cut], name[cut:], number)
        for name, number in vocabulary.items()
        for cut in range(1, len(name))
        if pieces.is_control(number) is False and name[:cut] in vocabulary and name[cut:] in vocabulary
    ]
    merges = [(a, b) for a, b, _ in sorted(splits, key=lambda split: split[2])]
    theirs = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    theirs.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    theirs.add_special_tokens(["<unk>", "<s>", "</s>"])
    theirs.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (data := tmp_path / "data").mkdir()
    theirs.save(str(data / "tokenizer.json"))
    (data / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    assert check(folder, data).endswith("with the same ids for texts; it has more special tokens: <unk>")
    change(data, lambda content: content["model"]["merges"].reverse())
    assert "in the model and" in refusal(folder, data)


def test_the_texts_of_a_difference_are_short(tokenizer_folder, model):
    change(model, single_spaces)
    both = (load_tokenizer("HuggingFaceTokenizer", folder) for folder in (model, tokenizer_folder))
    found = tokenizer_difference(*both, ("the model", "the data"))
    assert len(found) < 120

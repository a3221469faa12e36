"""Differences of logits against a slow reference, and findings for folders that a server could not load."""

import json
import math
import shutil

import pytest
import torch

from mft_megatron.convert.serving.folder_check import findings
from mft_megatron.convert.serving.logits_check import combine, compare
from mft_megatron.convert.serving.prompts import PROMPTS, encode, read_prompts
from mft_megatron.errors import InputError
from tests.convert import tiny_models

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers


def _slowly(reference, engine):
    """Largest difference, mean KL divergence and agreement, one position and token at a time."""
    largest, divergence, agreeing = 0.0, 0.0, 0
    for p_V, q_V in zip(reference.tolist(), engine.tolist(), strict=True):
        p_sum, q_sum = (math.fsum(map(math.exp, row)) for row in (p_V, q_V))
        for p, q in zip(p_V, q_V, strict=True):
            largest = max(largest, abs(p - q))
            divergence += math.exp(p) / p_sum * (p - math.log(p_sum) - q + math.log(q_sum))
        agreeing += p_V.index(max(p_V)) == q_V.index(max(q_V))
    return largest, divergence / len(reference), agreeing / len(reference)


def test_differences_equal_those_of_a_slow_reference():
    generator = torch.Generator().manual_seed(2)
    reference = 3 * torch.randn(70, 19, generator=generator)  # more rows than are compared at a time
    engine = reference + 0.7 * torch.randn(70, 19, generator=generator)
    difference = compare(reference, engine)
    expected = _slowly(reference, engine)
    assert (difference.largest, difference.divergence, difference.agreement) == pytest.approx(expected, rel=1e-12)
    assert difference.divergence != pytest.approx(_slowly(engine, reference)[1], rel=1e-2)
    assert 0.3 < difference.agreement < 1
    assert compare(reference, reference) == type(difference)(70, 0.0, 0.0, 1.0)
    parts = [compare(reference[:9], engine[:9]), compare(reference[9:], engine[9:])]
    total = combine(parts)
    assert (total.tokens, total.largest) == (70, difference.largest)
    assert (total.divergence, total.agreement) == pytest.approx(
        (difference.divergence, difference.agreement), rel=1e-12
    )


def test_nan_is_never_small():
    reference = torch.zeros(5, 4)
    with_nan = reference.clone()
    with_nan[3, 2] = math.nan
    difference = compare(reference, with_nan)
    assert math.isnan(difference.largest)
    assert math.isnan(difference.divergence)
    assert math.isnan(combine([compare(reference, reference), difference]).largest)
    assert math.isnan(combine([difference, compare(reference, reference)]).largest)


class _Letters:
    """A tokenizer of letters with the methods that the checks use."""

    chat_template = None

    def __len__(self):
        return 131

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [min(ord(letter), 130) for letter in text]}

    def convert_ids_to_tokens(self, ids):
        return [chr(number) for number in ids]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, tools, chat_template):
        assert add_generation_prompt > tokenize
        return self.chat_template.format(messages[0]["content"])


def test_prompts(tmp_path):
    tokenizer = _Letters()
    assert encode(tokenizer, None, 131, 12).keys() == PROMPTS.keys()
    tokenizer.chat_template = "<{}>"
    encoded = encode(tokenizer, None, 131, 10)
    assert encoded["chat"] == [ord(letter) for letter in "<Write a f"]
    for limit, texts in ((8, 16), (256, 4), (1, 128)):
        random = encode(None, None, 50, limit)
        assert random == encode(None, None, 50, limit)
        assert [len(text) for text in random.values()] == [128 // texts] * texts
        assert max(map(max, random.values())) < 50
    with pytest.raises(InputError, match="gives token 130, the vocabulary has 130"):
        encode(tokenizer, {"one": "é"}, 130, 8)
    with pytest.raises(InputError, match="prompt one: the tokenizer makes no tokens"):
        encode(tokenizer, {"two": "a" * 64, "one": ""}, 131, 64)
    with pytest.raises(InputError, match="--prompts: the folder has no tokenizer to encode them"):
        encode(None, {"one": "a"}, 131, 8)


@pytest.mark.parametrize(
    ("prompts", "limit", "tokens"),
    [
        ({"1": "a" * 63}, 99, 63),
        ({"1": "a" * 64}, 99, None),
        ({"1": "a" * 99}, 63, 63),
        (None, 10, 60),
        (None, 11, None),
    ],
)
def test_too_few_tokens_are_no_comparison(prompts, limit, tokens):
    if tokens is None:
        assert sum(map(len, encode(_Letters(), prompts, 131, limit).values())) >= 64
        return
    option = "--max-tokens" if prompts is None else "--prompts"
    with pytest.raises(InputError, match=f"{option}: {tokens} tokens are too few to tell two models apart"):
        encode(_Letters(), prompts, 131, limit)


def test_files_of_prompts(tmp_path):
    file = tmp_path / "prompts"
    file.write_text('def f():\n\n"two\\nlines"\n17\n')
    assert read_prompts(file) == {"line 1": "def f():", "line 3": "two\nlines", "line 4": "17"}
    file.write_text("\n \n")
    for wrong in (file, tmp_path / "none"):
        with pytest.raises(InputError, match="one prompt a line"):
            read_prompts(wrong)
    file.write_bytes("é".encode("utf-16"))
    with pytest.raises(InputError, match=r"prompts: not UTF-8 \(byte 0\); save it as UTF-8"):
        read_prompts(file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    tiny_models.write_model("qwen2 tied", folder)
    return folder


@pytest.fixture
def model(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def checked(folder, tokenizer=None):
    """Verdict and text of every finding, by subject."""
    return {finding.subject: (finding.verdict, finding.text) for finding in findings(folder, tokenizer, "none there")}


def test_a_good_folder(model):
    tokenizer = _Letters()
    tokenizer.chat_template = "<{}>"
    found = checked(model, tokenizer)
    assert {subject: word for subject, (word, _) in found.items() if word != "ok"} == {"entries": "note"}
    unread = "use_mrope: not read, because transformers' Qwen2Config has no such entry; other servers may read it"
    assert found["entries"][1] == unread
    assert found["vocabulary"][1] == "131 rows, none is padding of a parallel layout"
    assert found["stop tokens"][1] == "2, 3: \x02 \x03"
    assert list(checked(model)) == list(found)
    assert checked(model)["tokenizer"] == ("missing", "none there; random tokens are compared")


def change(file, **changes):
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))


def test_what_is_missing_or_wrong(model):
    config, generation = model / "config.json", model / "generation_config.json"

    def one(what, tokenizer=None):
        return checked(model, tokenizer)[what]

    change(config, torch_dtype="bfloat16", dtype="bfloat16")
    assert one("dtype") == ("note", "config.json says bfloat16, the weights are F32; give the server its --dtype")
    change(config, torch_dtype="absent", dtype="absent")
    assert one("dtype")[0] == "missing"
    change(generation, eos_token_id=[2, 131])
    assert one("stop tokens") == ("wrong", "[131] not in the vocabulary of 131; correct eos_token_id")
    generation.write_text("[")
    assert one("generation_config.json")[0] == "wrong"
    generation.unlink()
    change(config, eos_token_id=7)
    assert one("generation_config.json")[0] == "missing"
    assert one("stop tokens") == ("ok", "7")
    change(config, eos_token_id=None)
    assert one("stop tokens")[0] == "missing"
    tokenizer = _Letters()
    assert one("chat template", tokenizer)[0] == "missing"
    tokenizer.chat_template = "{} {"
    assert one("chat template", tokenizer)[0] == "wrong"
    change(config, vocab_size=130)
    assert one("weights")[0] == "wrong"  # one row too many, such as padding would be
    assert "embed_tokens.weight has the shape [131, 48], config.json says [130, 48]" in one("weights")[1]
    assert "vocabulary" not in checked(model)
    config.unlink()
    assert one("config.json")[0] == "wrong"


def test_a_tokenizer_that_is_larger_than_the_model(model, monkeypatch):
    monkeypatch.setattr(_Letters, "__len__", lambda self: 132)
    assert checked(model, _Letters())["tokenizer"] == ("wrong", "132 tokens, the model has 131; it is another's")

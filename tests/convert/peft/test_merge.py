"""Adapters merged into their model: equal to the formula and to PEFT, and nothing else changes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mft_megatron.convert.commands.huggingface import hf_to_mcore
from mft_megatron.convert.commands.merge import merge_lora
from mft_megatron.convert.commands.peft import lora_to_peft
from mft_megatron.convert.huggingface.chat_files import chat_template_of
from mft_megatron.convert.peft import merge
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from mft_megatron.run_folder.content import content_digest
from mft_megatron.run_folder.names import HUGGINGFACE, TOKENIZER
from tests.convert import made_adapters, tiny_models
from tests.descriptions import description_of, redescribe
from tests.full_disk import largest_file
from tests.refusals import refused_call

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE")
# by model: dtype, targets, and whether rsLoRA
CASES = {
    "llama with biases": ("float32", ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), True),
    "qwen2 tied": ("bfloat16", ("q_proj", "v_proj", "linear_fc1"), False),
    "gpt-neox": ("float32", ("k_proj", "v_proj", "linear_fc2"), False),
    "mixtral": ("bfloat16", ("linear_qkv", "linear_proj"), False),
}


class Case:
    """A model with adapters in every form.

    Attributes:
        hf: Hugging Face folder of the model.
        start: checkpoint of the model.
        adapters: run folder of adapters alone.
        whole: run folder of model and adapters.
        peft: PEFT folder of the adapters.
        named_as_exported: ``hf`` under the name of a checkpoint.
        info: description of the model.
        deltas: change of each weight by its adapters, by name, fp64.
    """

    def __init__(self, name, root):
        dtype, names, rslora = CASES[name]
        self.hf, self.start, self.adapters, self.whole, self.peft = (
            root / part for part in ("hf", "start", "adapters", "whole", "peft")
        )
        tiny_models.write_model(name, self.hf, dtype)
        hf_to_mcore(["--hf", str(self.hf), "--save", str(self.start)])
        self.info = made_adapters.info_of(self.hf)
        lora = made_adapters.lora_for(self.info, names, rslora=rslora)
        weights = made_adapters.random_adapters(self.info, lora)
        base = {"base": str(self.hf), "base_digest": content_digest(self.hf)}
        made_adapters.write_adapters(self.adapters, self.info, lora, weights, **base)
        reader = TensorReader(self.start / "iter_0000000")
        model = {key: reader.read(key) for key in reader.names()}
        made_adapters.write_run(self.whole, self.info, {**model, **weights}, lora=lora.as_dict())
        for run in (self.adapters, self.whole):
            shutil.copytree(self.start / HUGGINGFACE, run / HUGGINGFACE)
        lora_to_peft(["--load", str(self.adapters), "--hf", str(self.peft)])
        self.named_as_exported = root / "iter_0000003"
        self.named_as_exported.symlink_to(self.hf)
        self.deltas = made_adapters.deltas_of(self.info, lora, weights)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A function from a model's name to its :class:`Case`."""
    made = {}

    def case(name):
        if name not in made:
            made[name] = Case(name, tmp_path_factory.mktemp("merge"))
        return made[name]

    return case


def weights_of(folder):
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def check(case, folder):
    """Check that weights with an adapter are the rounded sum, and that other weights and all files are unchanged."""
    before, after = weights_of(case.hf), weights_of(folder)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        expected = weight if name not in case.deltas else (weight.double() + case.deltas[name]).to(weight.dtype)
        assert after[name].dtype == weight.dtype
        difference = (after[name].double() - expected.double()).abs()
        # fp64 sums in another order may round to the neighbouring number
        assert (difference == 0).double().mean() > 0.999, name
        assert (difference <= 2**-7 * expected.double().abs() * (weight.dtype == torch.bfloat16) + 3e-7).all(), name
        assert name not in case.deltas or not after[name].equal(weight)
    for file in FILES:
        assert (case.hf / file).read_bytes() == (folder / file).read_bytes(), file


SOURCES = {
    "its own model": lambda case: ("--load", case.whole),
    "the folder it came from": lambda case: ("--load", case.adapters),
    "a folder": lambda case: ("--load", case.adapters, "--base", case.named_as_exported),
    "a checkpoint": lambda case: ("--load", case.adapters, "--base", case.start),
    "PEFT and a folder": lambda case: ("--adapter", case.peft, "--base", case.hf),
    "PEFT and a checkpoint": lambda case: ("--adapter", case.peft, "--base", case.start),
}


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_the_sum(cases, name, tmp_path, monkeypatch):
    """The sum does not depend on the kind of folders, nor on how many rows are computed at a time."""
    case = cases(name)
    for number, words in enumerate(SOURCES.values()):
        monkeypatch.setattr(merge, "BLOCK_BYTES", (2**26, 5 * 8 * 48)[number % 2])
        merge_lora([*map(str, words(case)), "--hf", str(tmp_path / str(number)), "--max-shard-size", "60KB"])
        check(case, tmp_path / str(number))
    assert len(list((tmp_path / "0").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] == "float32"])
def test_merged_weights_equal_those_of_peft(cases, name, tmp_path):
    from peft import PeftModel

    case = cases(name)
    merge_lora(["--load", str(case.adapters), "--hf", str(tmp_path / "merged")])
    theirs = PeftModel.from_pretrained(made_adapters.load(case.hf, "float32"), case.peft).merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = weights_of(tmp_path / "merged"), weights_of(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    for weight, content in ours.items():
        assert (content - expected[weight]).abs().max() <= 3e-6, weight
    assert any(not content.equal(weights_of(case.hf)[weight]) for weight, content in ours.items())


def test_the_option_base_takes_precedence_over_the_checkpoints_model(cases, tmp_path):
    case = cases("qwen2 tied")
    shutil.copytree(case.hf, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"] += 1
    tiny_models.save_weights(weights, tmp_path / "hf" / "model.safetensors")
    merge_lora(["--load", str(case.whole), "--base", str(tmp_path / "hf"), "--hf", str(tmp_path / "merged")])
    assert weights_of(tmp_path / "merged")["model.norm.weight"].equal(weights["model.norm.weight"])


def test_several_adapters_are_added(cases, tmp_path, capsys):
    case = cases("qwen2 tied")
    lora, weights = made_adapters.write_random_adapters(
        tmp_path / "other", case.info, ("linear_qkv",), seed=5, rank=2, alpha=3.0
    )
    lora_to_peft(["--load", str(tmp_path / "other"), "--hf", str(tmp_path / "peft")])
    words = ("--adapter", case.peft, tmp_path / "peft", "--base", case.hf, "--hf", tmp_path / "merged")
    capsys.readouterr()
    merge_lora(list(map(str, words)))
    out = capsys.readouterr().out
    assert f"{case.peft}: LoRA of rank 3, alpha 5, on q_proj, v_proj" in out
    assert f"{tmp_path / 'peft'}: LoRA of rank 2, alpha 3, on linear_qkv" in out
    assert f"{case.hf} with 2 adapters -> " in out
    assert out.count(f"note: {case.hf}/config.json: use_mrope: not read, because transformers' Qwen2Config") == 1
    more = made_adapters.deltas_of(case.info, lora, weights)
    before, after = weights_of(case.hf), weights_of(tmp_path / "merged")
    both = 0
    for name in case.deltas | more:
        deltas = [of[name] for of in (case.deltas, more) if name in of]
        expected = (before[name].double() + sum(deltas)).to(torch.bfloat16)
        assert (after[name] == expected).double().mean() > 0.999, name
        both += len(deltas) == 2
    assert both == 2 * 3  # q and v of each layer


def test_a_model_that_did_not_come_from_hugging_face(tmp_path):
    """Its configuration and tokenizer are those of the run."""
    tiny_models.write_model("llama", tmp_path / "hf")
    hf_to_mcore(["--hf", str(tmp_path / "hf"), "--save", str(tmp_path / "start")])
    info = made_adapters.info_of(tmp_path / "hf")
    reader = TensorReader(tmp_path / "start" / "iter_0000000")
    lora = made_adapters.lora_for(info, ("linear_proj",))
    weights = {key: reader.read(key) for key in reader.names()}
    weights["embedding.word_embeddings.weight"] = torch.cat([weights["embedding.word_embeddings.weight"]] * 2)[:136]
    weights |= made_adapters.random_adapters(info, lora)
    tokens = {"eos_token_id": 3, "stop_token_ids": [3, 7]}
    made_adapters.write_run(tmp_path / "run", info, weights, lora=lora.as_dict(), source="", tokenizer=tokens)
    (tmp_path / "run" / TOKENIZER).mkdir()
    (tmp_path / "run" / TOKENIZER / "tokenizer.json").write_text("of the run")
    merge_lora(["--load", str(tmp_path / "run"), "--hf", str(tmp_path / "merged")])
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"], config["vocab_size"]) == ("llama", "float32", 131)
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [3, 7]
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "of the run"
    assert weights_of(tmp_path / "merged")["model.embed_tokens.weight"].shape == (131, 48)


@pytest.mark.parametrize(("in_peft_folder", "by_option"), [(False, False), (True, False), (True, True)])
def test_the_tokenizer_of_a_peft_folder(cases, tmp_path, in_peft_folder, by_option):
    case = cases("qwen2 tied")
    shutil.copytree(case.peft, tmp_path / "peft")
    folders = (tmp_path / "peft", in_peft_folder, "adapter's"), (tmp_path / "third", by_option, "third")
    for folder, has_tokenizer, text in folders:
        folder.mkdir(exist_ok=True)
        for file in folder.glob("tokenizer*"):
            file.unlink()
        if has_tokenizer:
            (folder / "tokenizer.json").write_text(text)
    words = ["--adapter", tmp_path / "peft", "--base", case.hf, "--hf", tmp_path / "merged"]
    words += ["--tokenizer-model", tmp_path / "third"] if by_option else []
    merge_lora(list(map(str, words)))
    expected = "third" if by_option else "adapter's" if in_peft_folder else (case.hf / "tokenizer.json").read_text()
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == expected
    assert (tmp_path / "merged" / "tokenizer_config.json").exists() != in_peft_folder


@pytest.mark.parametrize(
    ("template", "same_tokens", "said", "exported"),
    [
        (None, False, "peft has no chat template, and that of the model is left out", None),
        (None, True, None, "of the model"),
        ("other", False, "the chat template is that of", "other"),
        ("other", True, "the chat template is that of", "other"),
        ("of the model", False, None, "of the model"),
    ],
)
def test_the_chat_template_of_a_peft_folder(cases, tmp_path, capsys, template, same_tokens, said, exported):
    case = cases("qwen2 tied")
    shutil.copytree(case.peft, tmp_path / "peft")
    shutil.copytree(case.hf, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("of the model")
    tokens = (case.hf / "tokenizer.json").read_text() if same_tokens else "others"
    (tmp_path / "peft" / "tokenizer.json").write_text(tokens)
    if template is not None:
        (tmp_path / "peft" / "chat_template.jinja").write_text(template)
    words = ("--adapter", tmp_path / "peft", "--base", tmp_path / "hf", "--hf", tmp_path / "merged")
    merge_lora(list(map(str, words)))
    assert chat_template_of(tmp_path / "merged") == exported
    lines = [line for line in capsys.readouterr().out.splitlines() if "chat template" in line]
    assert [said in line for line in lines] == [True] * bool(said)


def test_stop_tokens_of_a_model_without_generation_configuration(cases, tmp_path):
    """They are those of the run that trained the adapters; PEFT folders have none."""
    case = cases("qwen2 tied")
    shutil.copytree(case.hf, tmp_path / "hf", ignore=shutil.ignore_patterns("generation_config.json"))
    shutil.copytree(case.adapters, tmp_path / "run")
    file = tmp_path / "run" / "iter_0000007" / "mft_checkpoint.json"
    redescribe(file, tokenizer={"stop_token_ids": [5, 9]})
    for number, words in enumerate((("--load", tmp_path / "run"), ("--adapter", case.peft))):
        merge_lora([*map(str, words), "--base", str(tmp_path / "hf"), "--hf", str(tmp_path / str(number))])
    assert json.loads((tmp_path / "0" / "generation_config.json").read_text()) == {"eos_token_id": [5, 9]}
    assert not (tmp_path / "1" / "generation_config.json").exists()


@pytest.mark.parametrize("base_has_template", [True, False])
def test_the_chat_format_that_was_trained(cases, tmp_path, capsys, base_has_template):
    """It is in the merged model, in the PEFT folder, and in a model that the PEFT folder is merged into."""
    case = cases("qwen2 tied")
    run, peft = tmp_path / "run", tmp_path / "peft"
    shutil.copytree(case.adapters, run)
    file = run / "iter_0000007" / "mft_checkpoint.json"
    trained = {"name": "mftcoder", "source": "{{ trained }}", "others": {}}
    tokenizer = {"stop_token_ids": [3, 9], "chat_template": trained}
    redescribe(file, tokenizer=tokenizer)
    (run / HUGGINGFACE / "chat_template.jinja").write_text("{{ of the model }}")
    shutil.copytree(case.hf, tmp_path / "hf")
    if base_has_template:
        (tmp_path / "hf" / "chat_template.jinja").write_text("{{ of the model }}")
    lora_to_peft(["--load", str(run), "--hf", str(peft)])
    output = capsys.readouterr().out
    assert output.count("is the chat format that was trained (mftcoder), not the one that came with the tokenizer") == 1
    assert (
        f"the base model, which has 2, 3 and lacks 9, which was trained: copy generation_config.json of {peft}"
        in output
    )
    assert not list(peft.glob("config.json"))
    for number, words in enumerate((("--load", run), ("--adapter", peft))):
        merge_lora([*map(str, words), "--base", str(tmp_path / "hf"), "--hf", str(tmp_path / str(number))])
        output = capsys.readouterr().out
        assert output.count("not the one that came with the ") == base_has_template
        assert output.count("stops at 9, too") == 1
    for folder in (peft, tmp_path / "0", tmp_path / "1"):
        assert (folder / "chat_template.jinja").read_text() == "{{ trained }}"
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 3, 9]


def refusal(target, *words):
    line = refused_call(merge_lora, [*map(str, words), "--hf", str(target)])
    assert not target.exists()
    assert not list(target.parent.glob(".*partial"))
    return line


def test_options_that_contradict_each_other(cases, tmp_path):
    case, target = cases("qwen2 tied"), tmp_path / "merged"
    assert "give --load CKPT or --adapter DIR" in refusal(target)
    assert "one of the two" in refusal(target, "--load", case.adapters, "--adapter", case.peft, "--base", case.hf)
    assert "--adapter: give --base, the model" in refusal(target, "--adapter", case.peft)
    assert "--best belongs to --load" in refusal(target, "--adapter", case.peft, "--base", case.hf, "--best")
    assert "named twice" in refusal(target, "--adapter", case.peft, case.peft, "--base", case.hf)
    assert "has no adapters; mcore-to-hf exports" in refusal(target, "--load", case.start)
    assert "has adapters itself; merge them first" in refusal(target, "--load", case.adapters, "--base", case.whole)
    for base, reason in (
        (tmp_path / "absent", "is no folder"),
        (tmp_path, "is neither a Hugging Face folder nor a checkpoint"),
        (case.peft, "is neither a Hugging Face folder nor a checkpoint"),
    ):
        assert f"--base {base}: {reason}" in refusal(target, "--load", case.adapters, "--base", base)
    other = cases("mixtral")
    for words in (("--base", other.hf), ("--base", other.start)):
        line = refusal(target, "--load", case.adapters, *words)
        assert "num_layers is 2, the adapters were trained with 3" in line
        assert "of another model" in refusal(target, "--adapter", case.peft, *words)
    (tmp_path / "hf").mkdir()
    shutil.copyfile(case.hf / "config.json", tmp_path / "hf" / "config.json")
    assert "no safetensors files there" in refusal(target, "--load", case.adapters, "--base", tmp_path / "hf")


def test_the_target_must_be_new(cases, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists already; remove it or name another folder"):
        merge_lora(["--load", str(cases("qwen2 tied").adapters), "--hf", str(tmp_path)])


def test_a_base_that_is_gone_or_has_changed(cases, tmp_path, capsys):
    """The base that the checkpoint names must be unchanged; for another one in --base a note is printed."""
    case, target = cases("qwen2 tied"), tmp_path / "merged"
    shutil.copytree(case.adapters, tmp_path / "run")
    file = tmp_path / "run" / "iter_0000007" / "mft_checkpoint.json"
    description = description_of(file)
    for changes, reason in (
        ({"base": ""}, "does not say of which model; give --base"),
        ({"base": str(tmp_path / "gone")}, "which is gone; give --base, where it is now"),
        ({"base_digest": "0"}, "has changed since; give --base, the one that the adapters were trained on"),
    ):
        redescribe(file, **{**description, **changes})
        assert reason in refusal(target, "--load", tmp_path / "run")
    merge_lora(["--load", str(tmp_path / "run"), "--base", str(case.hf), "--hf", str(target)])
    assert f"note: --base {case.hf} holds other files than" in capsys.readouterr().out
    check(case, target)


def test_a_full_disk_leaves_nothing(cases, tmp_path):
    case = cases("qwen2 tied")
    with largest_file(20_000), pytest.raises(InputError, match="File too large"):
        merge_lora(["--load", str(case.adapters), "--hf", str(tmp_path / "merged")])
    assert list(tmp_path.iterdir()) == []

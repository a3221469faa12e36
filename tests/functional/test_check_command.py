"""``convert_checkpoint.py check`` as a user runs it: output and failures."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from mft_megatron.convert.commands.check import check
from tests.descriptions import redescribe
from tests.ranks import run_on_ranks
from tests.refusals import refused_call


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer_folder):
    """A Qwen2 with tokenizer and chat template, its checkpoint, and a checkpoint of it with one weight changed."""
    from safetensors.torch import load_file, save_file

    from mft_megatron.convert.commands.huggingface import hf_to_mcore
    from tests.convert import tiny_models

    folder = tmp_path_factory.mktemp("check")
    tiny_models.write_model("qwen2 tied", folder / "model", tokenizer=tokenizer_folder, vocab_size=511)
    config = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "model", folder / "other")
    weights = load_file(folder / "other" / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.bias"][3] += 0.3
    save_file(weights, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    for name in ("model", "other"):
        hf_to_mcore(["--hf", str(folder / name), "--save", str(folder / f"checkpoint of {name}")])
    return folder


def _check(commands, folder):
    """Run commands; return the output and refusal of each, and whether bf16 logits have values of bf16 only."""
    from pathlib import Path

    from mft_megatron.convert.commands.convert import main
    from mft_megatron.convert.serving.logits_check import engine_logits
    from mft_megatron.errors import InputError

    results = []
    for words in commands:
        printed, refused = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            try:
                main(["check", *words])
            except InputError as error:
                refused = str(error)
        results.append((printed.getvalue(), refused))
    logits = engine_logits(Path(folder), None, "bf16", [[5, 6, 7]])[0]
    return results, logits.equal(logits.bfloat16().float())


def test_output_and_failures(models, tmp_path):
    hf = ["--hf", str(models / "model")]
    lines = [f"import module_{number} as short_name_{number}" for number in range(12)]
    (tmp_path / "prompts.txt").write_text("\n".join([*lines, '"def f():\\n    return 1"']))
    shutil.copytree(models / "model", tmp_path / "model")
    generation = tmp_path / "model" / "generation_config.json"
    generation.write_text('{"eos_token_id": 511}')
    shutil.copytree(models / "checkpoint of model", tmp_path / "run")
    file = tmp_path / "run" / "iter_0000000" / "mft_checkpoint.json"
    redescribe(file, vocab_size=510)
    (plain, same, other, low, strict, from_file, wrong, smaller), in_16_bits = run_on_ranks(
        1,
        _check,
        [
            hf,
            [*hf, "--load", str(models / "checkpoint of model")],
            [*hf, "--load", str(models / "checkpoint of other")],
            [*hf, "--dtype", "bf16"],
            [*hf, "--tolerance", "1e-9"],
            [*hf, "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "5"],
            ["--hf", str(tmp_path / "model")],
            [*hf, "--load", str(tmp_path / "run")],
        ],
        str(models / "model"),
    )[0]
    assert in_16_bits
    assert plain[1] is None
    lines = plain[0].splitlines()
    assert [line.split()[0] for line in lines[:9]] == ["ok", "note", *["ok"] * 7]
    assert "use_mrope: not read, because transformers' Qwen2Config has no such entry; other servers may" in lines[1]
    table = {line.split()[0]: line.split()[1:] for line in lines[12:]}
    assert list(table) == ["python", "c++", "sql", "json", "chinese", "shell", "chat", "total"]
    assert sum(int(row[0]) for name, row in table.items() if name != "total") == int(table["total"][0])
    assert 0 < float(table["total"][1]) < 1e-4
    assert table["total"][3] == "100.0%"
    assert same[1] is None
    assert "Megatron-Core with " in same[0]
    assert "largest difference of a logit is" in other[1]
    assert "above --tolerance 0.0001; do not serve" in other[1]
    assert low[1] is None
    assert float(low[0].splitlines()[-1].split()[2]) > 1e-2  # bf16 is not fp32
    assert "above --tolerance 1e-09" in strict[1]
    assert from_file[1] is None
    assert [line.split()[:3] for line in from_file[0].splitlines()[-3:-1]] == [["line", "12", "5"], ["line", "13", "5"]]
    assert "stop tokens wrong; see above, nothing was computed" in wrong[1]
    assert "KL" not in wrong[0]
    assert "vocabulary of 511, " in smaller[1]


def test_what_is_served_is_what_was_trained(models, dataset_prefix, tokenizer_folder, tmp_path):
    """Against the data set: the folder's own template is another one, and that of the data set passes."""
    from tests.convert import tiny_models

    ledger = json.loads(Path(f"{dataset_prefix}_dataset.json").read_text())
    # of a Qwen2 transformers changes how a tokenizer splits words, and then the check rightly fails
    tiny_models.write_model("llama", tmp_path / "exported", tokenizer=tokenizer_folder, vocab_size=511)
    (tmp_path / "exported" / "chat_template.jinja").write_text(ledger["chat_template"]["sources"][0]["source"])
    (tmp_path / "exported" / "generation_config.json").write_text('{"eos_token_id": [3, 0]}')
    shutil.copytree(models / "checkpoint of model", tmp_path / "run")
    file = tmp_path / "run" / "iter_0000000" / "mft_checkpoint.json"
    trained = {"name": "mftcoder", "source": "{{ messages[0].content }}", "others": {}}
    of_data = {**ledger["tokenizer"], "fingerprint": "of files that are gone"}
    tokenizer = {**of_data, "stop_token_ids": [3, 9], "chat_template": trained}
    redescribe(file, tokenizer=tokenizer)
    data = ["--data-path", dataset_prefix]
    (passed, other, of_run, of_both), _ = run_on_ranks(
        1,
        _check,
        [
            ["--hf", str(tmp_path / "exported"), *data],
            ["--hf", str(models / "model"), *data],
            ["--hf", str(tmp_path / "exported"), "--load", str(tmp_path / "run")],
            ["--hf", str(models / "model"), "--load", str(tmp_path / "run"), *data],
        ],
        str(models / "model"),
    )[0]
    assert passed[1] is None, passed[0]
    found = [line.split(maxsplit=1) for line in passed[0].split("\n\n")[0].splitlines()]
    assert {verdict for verdict, _ in found} == {"ok"}
    assert ["ok", f"trained tokenizer      that of {dataset_prefix}"] in found
    assert sum("a server sends what was trained" in text for _, text in found) == len(ledger["tasks"])
    assert "trained chat format, trained stop tokens, prompts of " in other[1]
    assert "wrong; see above, nothing was computed" in other[1]
    assert f"{dataset_prefix} has chatml: a server sends 'Question?" in other[0].replace("<|im_start|>", "")
    assert "trained chat format, trained stop tokens wrong" in of_run[1]
    assert "model: trained chat format, trained stop tokens, prompts of " in of_both[1]
    assert "note     trained tokenizer      its files are not byte by byte those of " in of_run[0]
    assert "generation_config.json lacks 9, which ends answers of" in of_run[0]


@pytest.mark.parametrize("name", ["gemma", "qwen2 tied"])
def test_a_folder_without_a_tokenizer(tmp_path, name):
    """transformers makes an empty one for these models, with which nothing would be compared."""
    from tests.convert import tiny_models

    tiny_models.write_model(name, tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    (tmp_path / "prompts.txt").write_text("def f():\n" * 20)
    hf = ["--hf", str(tmp_path / "model")]
    commands = [hf, [*hf, "--prompts", str(tmp_path / "prompts.txt")]]
    (plain, with_prompts), _ = run_on_ranks(1, _check, commands, str(tmp_path / "model"))[0]
    assert "tokenizer              no file of a vocabulary" in plain[0]
    assert plain[0].splitlines()[-1].split()[:2] == ["total", "128"]
    assert "--prompts: the folder has no tokenizer to encode them" in with_prompts[1]
    pointer = tmp_path / "model" / "tokenizer.model"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 10\n")
    assert f"{pointer}: is a pointer of Git LFS" in refused_call(check, hf)

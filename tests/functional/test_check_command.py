"""``convert_checkpoint.py check`` as a user runs it: output and failures."""

import contextlib
import io
import json
import shutil

import pytest

from tests.ranks import run_on_ranks


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
    (tmp_path / "prompts.txt").write_text('import os\n"def f():\\n    return 1"\n')
    shutil.copytree(models / "model", tmp_path / "model")
    generation = tmp_path / "model" / "generation_config.json"
    generation.write_text('{"eos_token_id": 511}')
    shutil.copytree(models / "checkpoint of model", tmp_path / "run")
    file = tmp_path / "run" / "iter_0000000" / "mft_checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 510}))
    (plain, same, other, low, strict, from_file, wrong, smaller), in_16_bits = run_on_ranks(
        1,
        _check,
        [
            hf,
            [*hf, "--load", str(models / "checkpoint of model")],
            [*hf, "--load", str(models / "checkpoint of other")],
            [*hf, "--dtype", "bf16"],
            [*hf, "--tolerance", "1e-9"],
            [*hf, "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "4"],
            ["--hf", str(tmp_path / "model")],
            [*hf, "--load", str(tmp_path / "run")],
        ],
        str(models / "model"),
    )[0]
    assert in_16_bits
    assert plain[1] is None
    lines = plain[0].splitlines()
    assert [line.split()[0] for line in lines[:8]] == ["ok"] * 8
    table = {line.split()[0]: line.split()[1:] for line in lines[11:]}
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
    assert [line.split()[:3] for line in from_file[0].splitlines()[-3:-1]] == [["line", "1", "4"], ["line", "2", "4"]]
    assert "stop tokens wrong; see above, nothing was computed" in wrong[1]
    assert "KL" not in wrong[0]
    assert "vocabulary of 511, " in smaller[1]

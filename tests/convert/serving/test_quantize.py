"""Calibration samples, and files around the export in 4 bits.

The library that rounds weights needs a separate environment; a stand-in replaces it here.
"""

import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mft_megatron.convert.commands.quantize import main
from mft_megatron.convert.serving.quantize import GROUP, IGNORED, calibration, quantize
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.errors import InputError
from tests import made_dataset
from tests.ranks import ROOT
from tests.refusals import refused_call


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    prefix = str(tmp_path_factory.mktemp("data") / "d")
    made_dataset.write_dataset(prefix, 512)
    return prefix


def test_every_task_is_represented(prefix):
    dataset = PackedDataset.open(prefix, 512)
    slices = dataset.split("train").slices(slice(None))
    texts_of_task = [set() for _ in dataset.tasks]
    for sample, start, length in zip(*slices, strict=True):
        begin = dataset.tokens.start_of(sample) + start
        texts_of_task[dataset.task_ids[sample]].add(
            bytes(dataset.tokens.items[begin : begin + length].astype(np.uint8))
        )
    available = [int((dataset.task_ids[slices.samples] == task).sum()) for task in range(4)]
    smallest = min(available)
    found = calibration(dataset, "train", 4 * smallest)
    assert list(found.by_task.values()) == [smallest] * 4
    at = 0
    for texts, count in zip(texts_of_task, found.by_task.values(), strict=True):
        taken = [bytes(text.astype(np.uint8)) for text in found.texts[at : at + count]]
        at += count
        assert set(taken) <= texts
        assert len(set(taken)) > 0.9 * count  # spread over the samples, hardly any twice
    assert all(text.dtype == np.int64 for text in found.texts)
    # larger tasks make up for small ones; no more samples than there are
    assert sum(calibration(dataset, "train", 4 * smallest + 3).by_task.values()) == 4 * smallest + 3
    assert list(calibration(dataset, "train", 10**6).by_task.values()) == available
    assert list(calibration(dataset, "train", 2).by_task.values()) == [1, 1, 0, 0]


def test_slices_of_long_samples_are_taken_from_where_they_start(tmp_path):
    prefix = str(tmp_path / "d")
    made_dataset.write_dataset(prefix, 128, longest=512, documents=True, overlong="split", split=(1, 0, 0))
    dataset = PackedDataset.open(prefix, 128)
    slices = dataset.split("train").slices(slice(None))
    assert (slices.starts > 0).sum() > 20
    expected = []
    for sample, start, length in zip(*slices, strict=True):
        begin = dataset.tokens.start_of(sample) + start
        expected.append(dataset.tokens.items[begin : begin + length].tolist())
    texts = [text.tolist() for text in calibration(dataset, "train", 10**6).texts]
    assert sorted(texts) == sorted(text for text in expected if len(text) > 1)


@pytest.mark.slow  # imports torch once more
def test_it_needs_no_megatron_core():
    """The library's environment has none."""
    code = (
        "import sys; sys.modules['megatron'] = None; import mft_megatron.convert.commands.quantize; "
        "print([name for name in sys.modules if name.startswith(('megatron.', 'transformers'))])"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


class _Model:
    """Model that the stand-in library returns."""

    quantized = True

    def save_pretrained(self, folder, save_compressed):
        assert save_compressed
        entries = {"quantization_config": {"quant_method": "compressed-tensors"}} if self.quantized else {}
        (folder / "config.json").write_text(json.dumps({"of": "the library", **entries}))
        (folder / "generation_config.json").write_text("of the library")


@pytest.fixture
def asked(monkeypatch):
    """Replace the library by a stand-in; the arguments of its calls."""
    arguments = {}
    loader = types.SimpleNamespace(from_pretrained=lambda folder, **options: _Model())
    modules = {
        "llmcompressor": {"oneshot": lambda **given: arguments.update(given) or given["model"]},
        "llmcompressor.modifiers": {},
        "transformers": {"AutoModelForCausalLM": loader},
        "llmcompressor.modifiers.gptq": {"GPTQModifier": dict},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return arguments


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 257, "hidden_size": 2 * GROUP}))
    for name in ("generation_config.json", "tokenizer.json", "LICENSE"):
        (folder / name).write_text("as it is")
    return folder


def test_arguments_of_the_library_and_written_files(prefix, asked, model, tmp_path, capsys):
    command_line = (
        "--hf",
        model,
        "--out",
        tmp_path / "out",
        "--data-path",
        prefix,
        "--split",
        "train",
        "--samples",
        "8",
    )
    main([str(word) for word in command_line])
    assert "calibration: 8 samples" in capsys.readouterr().out
    recipe = asked["recipe"][0]
    assert (recipe["scheme"], recipe["targets"], recipe["ignore"]) == ("W4A16", "Linear", list(IGNORED))
    rows = list(asked["dataset"])
    expected = calibration(PackedDataset.open(prefix, 512), "train", 8).texts
    assert [row["input_ids"][0].tolist() for row in rows] == [text.tolist() for text in expected]
    assert all(row["attention_mask"].all() and row["attention_mask"].shape[0] == 1 for row in rows)
    written = {file.name: file.read_text() for file in (tmp_path / "out").iterdir()}
    assert sorted(written) == ["LICENSE", "config.json", "generation_config.json", "tokenizer.json"]
    assert json.loads(written["config.json"])["of"] == "the library"
    assert written["generation_config.json"] == "of the library"


def test_nothing_is_left_of_a_model_that_was_not_rounded(asked, model, tmp_path, monkeypatch):
    monkeypatch.setattr(_Model, "quantized", False)
    with pytest.raises(InputError, match="left the model as it was"):
        quantize(model, tmp_path / "out", "gptq", [np.arange(5)])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_scale_that_is_not_finite_is_refused(asked, model, tmp_path, monkeypatch):
    """The library divides by what a matrix has, and writes what comes out."""
    save = _Model.save_pretrained

    def with_a_nan(self, folder, **named):
        save(self, folder, **named)
        weights = {"codes": torch.zeros(4, dtype=torch.int32), "w.weight_scale": torch.tensor([1.0, math.nan])}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(_Model, "save_pretrained", with_a_nan)
    with pytest.raises(InputError, match=r"^w.weight_scale would have NaN in it"):
        quantize(model, tmp_path / "out", "gptq", [np.arange(5)])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_refusals(prefix, model, tmp_path, monkeypatch):
    def refused(**changes):
        options = {"--hf": model, "--out": tmp_path / "out", "--data-path": prefix, **changes}
        line = refused_call(main, [str(word) for pair in options.items() for word in pair])
        assert not (tmp_path / "out").exists()
        return line

    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    assert "pip install -r examples/int4/requirements.txt" in refused()
    assert "has no test split" in refused(**{"--split": "test"})
    assert "is packed for 512" in refused(**{"--seq-length": 256})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "exists already" in refused(**{"--out": tmp_path / "full"})
    for changes, reason in (
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple of 128"),
        ({"vocab_size": 256}, "vocabulary of 256, the data set .* needs 257"),
    ):
        (model / "config.json").write_text(json.dumps({"vocab_size": 257, **changes}))
        with pytest.raises(InputError, match=reason):
            main(["--hf", str(model), "--out", str(tmp_path / "out"), "--data-path", prefix])

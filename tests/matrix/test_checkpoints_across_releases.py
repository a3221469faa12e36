"""Checkpoints written under one release of Megatron-Core load under any other, optimizer states too.

``MFT_OTHER_MEGATRON_CORE`` names folders with other releases (``pip install --no-deps --target FOLDER``), separated as
in ``PATH``. Every release trains without interruption and saves half-way; others resume from there and arrive at the
same bits. The installed release exchanges every kind of checkpoint with each other one, and any two the first kind.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mft_megatron.run_folder.names import iteration_folder
from tests.ranks import ROOT
from tests.run_records import records
from tests.saved_checkpoints import optimizer_numbers, tensors_of

OTHERS = [Path(folder) for folder in os.environ.get("MFT_OTHER_MEGATRON_CORE", "").split(os.pathsep) if folder]
INSTALLED = "installed"
RELEASES = {INSTALLED: None, **{folder.name: folder for folder in OTHERS}}

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--position-embedding-type rope --untie-embeddings-and-output-weights"
)
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-router-enable-expert-bias --moe-router-score-function sigmoid"
RUN = (
    "--micro-batch-size 1 --global-batch-size 2 --train-iters 4 --save-interval 2 --eval-iters 0 --lr 1e-3 "
    "--log-interval 1 --seed 3 --hidden-dropout 0.1 --attention-dropout 0"
)
SHARDED = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --async-save"
LORA = "--peft-type lora --lora-rank 4 --lora-dropout 0.1 --save-adapters-only"
# by name: ranks, options of every run, and what a run that begins needs besides; {hf} is a model of Hugging Face, and
# {model} the checkpoint that it was converted to
CASES = {
    "distributed optimizer": (2, SHARDED, MODEL),
    "one process": (None, "--bf16", MODEL),
    "tensor parallel": (2, "--tensor-model-parallel-size 2 --optimizer sgd", MODEL),
    "experts": (None, "--moe-router-load-balancing-type none", f"{MODEL} {EXPERTS}"),
    "adapters": (None, f"{LORA} --hf-checkpoint {{hf}}", ""),
    "converted": (None, "", "--load {model}"),
}
EXPORTS = {"model": "mcore-to-hf", "converted": "mcore-to-hf", "adapters": "lora-to-peft"}


def cases_of(writer, reader):
    """Cases whose checkpoints ``reader`` loads from ``writer``."""
    return list(CASES) if INSTALLED in (writer, reader) else ["distributed optimizer"]


def run_under(release, jobs):
    """Run jobs of :mod:`tests.matrix.session` in a new process with a release."""
    folder = RELEASES[release]
    paths = [*([str(folder)] if folder else []), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.run(
        [sys.executable, "-m", "tests.matrix.session", json.dumps(jobs)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, f"{release}: {process.stdout}{process.stderr}"
    used = Path(process.stdout.split("\n", 1)[0])
    assert [other for other in OTHERS if used.is_relative_to(other)] == ([folder] if folder else []), (
        f"{release}: Megatron-Core was imported from {used}"
    )


def content(folder):
    """Content of the checkpoint after step 4 and the run's log, by name: tensors, the optimizer's numbers, steps."""
    path = iteration_folder(folder, 4)
    found = tensors_of(path)
    assert [name for name in found if name.startswith("optimizer.")]
    found["optimizer"] = optimizer_numbers(path)
    for record in records(folder, "train"):
        found[f"step {record['step']}"] = {name: record[name] for name in ("loss", "grad_norm", "tasks")}
    return found


def differences(found, expected):
    """Names of what differs, in any bit."""
    import torch

    missing = object()
    names = []
    for name in sorted(found.keys() | expected.keys()):
        one, other = found.get(name, missing), expected.get(name, missing)
        same = one.equal(other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other
        names += [] if same else [name]
    return names


@pytest.mark.skipif(not OTHERS, reason="MFT_OTHER_MEGATRON_CORE names no folders with other releases of Megatron-Core")
def test_checkpoints_go_from_one_release_to_another(dataset_prefix, tokenizer_folder, tmp_path):
    from safetensors.torch import load_file

    from tests.convert import tiny_models

    hf = tmp_path / "hf"
    sizes = {"vocab_size": 500, "max_position_embeddings": 256, "num_hidden_layers": 2}
    tiny_models.write_model("llama", hf, "float32", tokenizer_folder, **sizes)

    def train(case, save, source):
        world_size, options, begin = CASES[case]
        words = f"{RUN} {options.format(hf=hf)} {'' if source else begin.format(model=save.parent / 'model')}".split()
        words += ["--data-path", dataset_prefix, "--save", str(save), *(["--load", str(source)] if source else [])]
        return "pretrain_mft.py", world_size, words

    def convert(action, *words):
        return "tools/convert_checkpoint.py", None, [action, *map(str, words)]

    for writer in RELEASES:
        folder = tmp_path / writer
        model = convert("hf-to-mcore", "--hf", hf, "--save", folder / "model")
        run_under(writer, [model, *(train(case, folder / case, None) for case in CASES)])
    pairs = list(itertools.permutations(RELEASES, 2))
    for reader in RELEASES:
        jobs = []
        for writer in (writer for writer, other in pairs if other == reader):
            source, target = tmp_path / writer, tmp_path / f"{writer} to {reader}"
            cases = cases_of(writer, reader)
            jobs += [train(case, target / case, iteration_folder(source / case, 2)) for case in cases]
            if "converted" in cases:
                jobs.append(train("converted", target / "of model", source / "model"))
                for name, action in EXPORTS.items():
                    jobs.append(convert(action, "--load", source / name, "--hf", target / f"exported {name}"))
        run_under(reader, jobs)

    expected = {case: content(tmp_path / INSTALLED / case) for case in CASES}
    found = {}  # what differs, by releases and case
    for writer in list(RELEASES)[1:]:
        for case in CASES:
            found[writer, case] = differences(content(tmp_path / writer / case), expected[case])
    for writer, reader in pairs:
        target = tmp_path / f"{writer} to {reader}"
        for case in cases_of(writer, reader):
            resumed = {name: expected[case][name] for name in expected[case] if name not in ("step 1", "step 2")}
            found[target.name, case] = differences(content(target / case), resumed)
        if "converted" in cases_of(writer, reader):
            found[target.name, "of model"] = differences(content(target / "of model"), expected["converted"])
            exports = {name: next((target / f"exported {name}").glob("*.safetensors")) for name in EXPORTS}
            found[target.name, "model"] = differences(load_file(exports["model"]), load_file(hf / "model.safetensors"))
            for name in ("converted", "adapters"):
                first = next((tmp_path / f"{pairs[0][0]} to {pairs[0][1]}" / f"exported {name}").glob("*.safetensors"))
                found[target.name, f"export of {name}"] = differences(load_file(exports[name]), load_file(first))
    assert len(found) >= 4 * len(OTHERS) * len(CASES)
    assert {key: names for key, names in found.items() if names} == {}

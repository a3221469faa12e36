"""The certificate of packs on CUDA, with every attention kernel, as ``tools/verify.py packs`` gives it."""

import json

import pytest

from tests.gpu.test_cuda_training import BACKENDS, skip_if_unavailable
from tests.made_dataset import write_dataset
from tests.ranks import run_tool

MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --init-method-std 0.2 --position-embedding-type rope "
    "--attention-dropout 0 --hidden-dropout 0"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The prefix of a data set, and the folder of a run on it in bf16."""
    folder = tmp_path_factory.mktemp("packs")
    write_dataset(str(folder / "data"), 256, longest=110)
    words = f"{MODEL} --bf16 --micro-batch-size 2 --global-batch-size 4 --train-iters 1 --lr 1e-3"
    process = run_tool("pretrain_mft.py", "--data-path", folder / "data", "--save", folder / "run", *words.split())
    assert process.returncode == 0, process.stderr
    return folder / "data", folder / "run"


def certificate(run, *options):
    """Run the command, which must give the certificate; its result as JSON."""
    prefix, folder = run
    file = folder / f"{'-'.join(options)}.json"
    process = run_tool("tools/verify.py", "packs", prefix, "--load", folder, "--rows", 8, "--json", file, *options)
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_are_on_their_own_in_bf16(run, backend):
    skip_if_unavailable(backend)
    assert f"attention: {backend}" in certificate(run, "--attention-backend", backend)["kernels"]


def test_samples_are_on_their_own_in_fp32(run):
    assert "attention: local" in certificate(run, "--dtype", "fp32")["kernels"]

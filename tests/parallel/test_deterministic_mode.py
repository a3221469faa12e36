"""``--deterministic-mode``: two runs of the same command give the same bits, with several threads on each rank."""

import os
import subprocess
import sys

import pytest

from tests.made_dataset import write_dataset
from tests.parallel.layouts import SHAPES
from tests.parallel.run import RUN as SHORT
from tests.parallel.run import arguments_for
from tests.ranks import ROOT, reserved_ports, run_on_ranks
from tests.run_records import records

THREADS = 3
RUN = (
    "--deterministic-mode --global-batch-size 8 --train-iters 3 --log-interval 1 --eval-interval 2 --num-layers 2 "
    "--hidden-size 32 --hidden-dropout 0.1 --attention-dropout 0.1 --task-balance coba --coba-update-interval 1"
)
CASES = {
    "dense": (2, "llama", "--tensor-model-parallel-size 2"),
    "experts": (2, "experts", "--expert-model-parallel-size 2 --bf16"),
    "adapters": (1, "llama", "--peft-type lora --lora-rank 4"),
}
# of a record: what a clock says
TIMES = ("step_time", "balance_time", "balance_share")


def _run(prefix, folders, shape, words, world_size, ports):
    """Run twice; returns the threads and whether torch's deterministic algorithms were on."""
    import torch

    from mft_megatron.training.pretrain import pretrain

    torch.set_num_threads(THREADS)
    for folder, port in zip(folders, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        pretrain(arguments_for(prefix, f"{RUN} {words} --save {folder}", world_size, shape), os.environ["RANK"] == "0")
    return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


def numbers(folder):
    """Records of a run without times, and the bytes of its checkpoints' tensors."""
    kept = [
        {name: value for name, value in record.items() if name not in TIMES}
        for kind in ("train", "valid")
        for record in records(folder, kind)
    ]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.distcp"))}
    assert len(kept) >= 5
    assert files
    return kept, files


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """A small data set of four tasks."""
    prefix = tmp_path_factory.mktemp("data") / "set"
    write_dataset(prefix, 128, longest=100)
    return str(prefix)


@pytest.mark.parametrize(
    "case", [*(pytest.param(case, marks=pytest.mark.slow) for case in ("dense", "experts")), "adapters"]
)
def test_two_runs_give_the_same_bits(case, prefix, tmp_path):
    world_size, shape, words = CASES[case]
    folders = [tmp_path / name for name in ("first", "second")]
    with reserved_ports(2) as ports:
        results = run_on_ranks(world_size, _run, prefix, folders, shape, words, world_size, ports)
    assert results == [(THREADS, True)] * world_size
    first, second = map(numbers, folders)
    assert first == second


@pytest.mark.slow
def test_two_processes_give_the_same_bits(prefix, tmp_path):
    """Also where Python orders its sets otherwise."""
    words = f"{SHAPES['experts']} {SHORT} {RUN} --data-path {prefix} --micro-batch-size 2".split()
    folders = [tmp_path / name for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "pretrain_mft.py", *words, "--save", str(folder)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    first, second = map(numbers, folders)
    assert first == second

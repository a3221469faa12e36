"""Two GPUs with NCCL against one, through ``pretrain_mft.py``: losses, gradient norms and a resumed run."""

import json

import pytest
import torch

from tests.gpu.device_runs import worst
from tests.ranks import run_tool

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--seq-length 128 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 "
    "--train-iters 3 --log-interval 1 --eval-interval 3"
)
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 30001"
LAYOUTS = {
    "DP": "",
    "DP, overlapped": SHARDED,
    "TP": "--tensor-model-parallel-size 2",
    "TP with sequence parallelism": "--tensor-model-parallel-size 2 --sequence-parallel",
    "PP": "--pipeline-model-parallel-size 2",
    "PP, interleaved": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "CP": "--context-parallel-size 2",
    "experts over ranks": "--num-experts 4 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
}


def run(gpus, prefix, folder, options):
    """Train three steps; returns loss and gradient norm of each."""
    words = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "pretrain_mft.py")
    process = run_tool(*words, "--data-path", prefix, "--save", folder, *MODEL.split(), *options.split(), timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[record["loss"], record["grad_norm"]] for record in records if record["kind"] == "train"]


@pytest.fixture(scope="module")
def of_one_gpu(dataset_prefix, tmp_path_factory):
    """Losses and gradient norms of dense and expert models on one GPU."""
    folder = tmp_path_factory.mktemp("one")
    return {
        name: run(1, dataset_prefix, folder / name, options)
        for name, options in {"dense": "", "experts": "--num-experts 4"}.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_equal_one(dataset_prefix, tmp_path, of_one_gpu, layout, within):
    options = LAYOUTS[layout]
    found = run(2, dataset_prefix, tmp_path, options)
    within(worst(found, of_one_gpu["experts" if "--num-experts" in options else "dense"]), 1e-4)


def test_a_layout_resumes_another(dataset_prefix, tmp_path, of_one_gpu, within):
    """The third step, on TP after two steps with data parallelism, equals that of one GPU."""
    run(2, dataset_prefix, tmp_path, f"{SHARDED} --exit-interval 2")
    resumed = run(2, dataset_prefix, tmp_path, f"{LAYOUTS['TP']} --load {tmp_path}")
    within(worst(resumed[-1], of_one_gpu["dense"][-1]), 1e-4)

"""A mixture of experts through the command line: expert parallelism, the log, a resume at another parallel layout."""

import pytest

from tests.ranks import run_forked
from tests.run_records import records

MODEL = (
    "--num-layers 3 --hidden-size 64 --num-attention-heads 4 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --num-experts 4 --moe-layer-freq [0]+[1]*2 "
    "--moe-ffn-hidden-size 48 --moe-shared-expert-intermediate-size 32"
).split()
RUN = (
    "--seq-length 128 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --log-interval 1 --eval-interval 4 "
    "--moe-aux-loss-coeff 1e-2 --moe-router-load-balancing-type seq_aux_loss --moe-z-loss-coeff 1e-3"
).split()
EXPERT_PARALLEL = "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --moe-per-layer-logging".split()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, dataset_prefix):
    """The folder of a run of two steps with the experts on two ranks."""
    folder = tmp_path_factory.mktemp("run")
    words = [*MODEL, *RUN, *EXPERT_PARALLEL, "--train-iters", 2, "--data-path", dataset_prefix, "--save", folder]
    process = run_forked("pretrain_mft.py", *words, world_size=2)
    assert process.returncode == 0, process.stderr
    assert "DP 2 (experts over 2)" in process.stdout
    return folder


def test_router_losses_are_logged(run_folder):
    for record in records(run_folder, "train"):
        losses = record["moe"]
        assert set(losses) == {"seq_load_balancing_loss", "z_loss", "layers"}
        assert set(losses["layers"]) == {"2", "3"}
        for name in ("seq_load_balancing_loss", "z_loss"):
            by_layer = [losses["layers"][layer][name] for layer in ("2", "3")]
            assert losses[name] == pytest.approx(sum(by_layer) / 2, rel=1e-12)
        assert 0.99 < losses["seq_load_balancing_loss"] < 2
        assert 1 < losses["z_loss"] < 4  # of 4 scores near 0: log(4) squared is 1.92
    first, second = (record["moe"]["seq_load_balancing_loss"] for record in records(run_folder, "train"))
    assert first != second


@pytest.mark.slow
def test_resumes_in_one_process(run_folder, dataset_prefix):
    words = ["--train-iters", 3, "--data-path", dataset_prefix, "--save", run_folder, "--load", run_folder]
    process = run_forked("pretrain_mft.py", *RUN, *words)
    assert process.returncode == 0, process.stderr
    assert [record["step"] for record in records(run_folder, "train")] == [1, 2, 3]
    assert "layers" not in records(run_folder, "train")[-1]["moe"]

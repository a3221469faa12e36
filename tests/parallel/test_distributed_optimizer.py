"""The distributed optimizer and overlapped communication change no result."""

import pytest

from tests.parallel.run import train
from tests.ranks import run_on_ranks

TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
VPP = f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 1"
SHARDED = "--use-distributed-optimizer"
# several buckets per model chunk, none a multiple of the number of ranks
REDUCE = "--overlap-grad-reduce --ddp-bucket-size 30001"
OVERLAP = f"{SHARDED} {REDUCE} --overlap-param-gather"
NOT_ALIGNED = "--no-align-grad-reduce --no-align-param-gather"
TIED = "tied"
CASES = {
    "TP2 DP2 overlap": (4, f"{TP2} --sequence-parallel {OVERLAP}", "llama"),
    "PP2 VPP2 DP2 overlap": (4, f"{VPP} {OVERLAP}", "llama"),
}
SLOW = {
    "DP2 overlap, tied": (2, OVERLAP, TIED),
    "DP2": (2, SHARDED, "llama"),
    "DP2 reduce": (2, REDUCE, "llama"),
    "DP2 overlap, Megatron's cross entropy": (2, f"{OVERLAP} --cross-entropy-impl megatron", "llama"),
    "PP2 DP2 overlap, tied": (4, f"{PP2} {OVERLAP} --micro-batch-size 1", TIED),
    "one rank": (1, OVERLAP, "llama"),
    "DP2 overlap, focal": (2, f"{OVERLAP} --mft-loss focal-sample", "llama"),
    "DP2 number of buckets given": (2, f"{SHARDED} --overlap-grad-reduce --ddp-num-buckets 3", "llama"),
    "DP2 padded": (2, f"{OVERLAP} --ddp-pad-buckets-for-high-nccl-busbw", "llama"),
    "DP4": (4, SHARDED, "llama"),
    "DP4 overlap": (4, f"{OVERLAP} --micro-batch-size 1", "llama"),
    "TP2 DP2": (4, f"{TP2} {SHARDED}", "llama"),
    "PP2 DP2": (4, f"{PP2} {SHARDED} --micro-batch-size 1", "llama"),
    "PP2 DP2 overlap, not aligned": (4, f"{PP2} {OVERLAP} --no-align-grad-reduce --micro-batch-size 1", "llama"),
    "PP2 VPP2 overlap": (2, f"{VPP} {OVERLAP}", "llama"),
    "PP2 VPP2 DP2": (4, f"{VPP} {SHARDED}", TIED),
    "PP2 VPP2 DP2 overlap, not aligned": (4, f"{VPP} {OVERLAP} {NOT_ALIGNED}", "llama"),
}
_ALONE = {}


def _alone(prefix, extra, shape):
    """Five steps of one process, without the distributed optimizer."""
    if (extra, shape) not in _ALONE:
        _ALONE[extra, shape] = run_on_ranks(1, train, prefix, extra, 1, (1.0, 2.0, 0.5, 3.0), 5, shape)[0]
    return _ALONE[extra, shape]


def _same_as_alone(prefix, world, options, shape):
    loss = "--mft-loss focal-sample" if "focal" in options else ""
    expected, sums = _alone(prefix, loss, shape)
    for curve, sums_of_rank in run_on_ranks(world, train, prefix, options, world, (1.0, 2.0, 0.5, 3.0), 5, shape):
        for ours, theirs in zip(curve, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        for name in sums:
            assert sums_of_rank[name] == pytest.approx(sums[name], rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_as_one_process(dataset_prefix, case):
    _same_as_alone(dataset_prefix, *CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_the_same_numbers_in_every_layout(dataset_prefix, case):
    _same_as_alone(dataset_prefix, *SLOW[case])


INSTANCES = (4, f"{SHARDED} --num-distributed-optimizer-instances 2", "llama")


@pytest.mark.slow
def test_two_instances_of_the_optimizer(dataset_prefix):
    pytest.importorskip("einops")
    _same_as_alone(dataset_prefix, *INSTANCES)


def _refused(prefix, options, world):
    import importlib.util
    from unittest import mock

    from mft_megatron.errors import InputError
    from mft_megatron.mcore.parallel import process_groups
    from tests.parallel.run import arguments_for

    arguments = arguments_for(prefix, options, world)
    try:
        with (
            mock.patch.object(importlib.util, "find_spec", return_value=None),
            process_groups.process_groups(arguments.distributed, 1),
        ):
            pass
    except InputError as error:
        return str(error)


def test_instances_without_einops_are_refused(dataset_prefix):
    options = f"{SHARDED} --num-distributed-optimizer-instances 2"
    assert "pip install einops" in run_on_ranks(2, _refused, dataset_prefix, options, 2)[0]

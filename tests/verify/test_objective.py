"""The certificate of the objective: given on sound layouts, refused with each planted fault."""

import pytest

from mft_megatron.verify.objective.comparison import bounds_of, compare
from tests.made_dataset import TASKS, write_dataset
from tests.ranks import run_on_ranks
from tests.verify.objective_runs import FAULTS, layout_steps, reference_steps

LENGTH = 128
CP2 = "--context-parallel-size 2 --micro-batch-size 2"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    prefix = str(tmp_path_factory.mktemp("objective") / "data")
    write_dataset(prefix, LENGTH, longest=60)
    return prefix


def compared(prefix, options, world_size, faults=("none",), shape="llama", steps=1, precision="fp32"):
    """Lines of the first steps by fault, each compared with the reference of another process."""
    measured, weights = run_on_ranks(world_size, layout_steps, prefix, options, world_size, faults, shape, steps)[0]
    reference = run_on_ranks(1, reference_steps, prefix, options, world_size, weights, shape, steps)[0]
    bounds = bounds_of(precision, "focal-sample" if "focal-sample" in options else "task-token")
    return {
        fault: [
            line
            for step, wanted, rounded, target_K in zip(measured[fault], *reference, strict=True)
            for line in compare(step, wanted, rounded, target_K, list(TASKS), bounds)
        ]
        for fault in faults
    }


def found(lines):
    """The tables in which a figure is beyond its bound."""
    return {line.table for line in lines if not line.holds}


@pytest.fixture(scope="module")
def with_faults(prefix):
    return compared(prefix, CP2, 2, tuple(FAULTS))


def test_a_sound_run_is_certified(with_faults):
    lines = with_faults["none"]
    assert found(lines) == set()
    assert {line.table for line in lines} == {"share", "loss", "gradient"}
    assert max(line.error for line in lines if line.table == "share") < 1e-12


@pytest.mark.parametrize(
    ("fault", "tables"),
    [
        ("wrong weight", {"share", "loss", "gradient"}),
        ("mask off by one", {"loss", "gradient"}),
        ("label of the next sample", {"share", "loss", "gradient"}),
        ("doubled sample", {"share", "loss", "gradient"}),
        ("attention leak", {"loss", "gradient"}),
        ("context-parallel gradient counted twice", {"gradient"}),
        ("gradients averaged", {"gradient"}),
        ("gradients that are not finite", {"gradient"}),
    ],
)
def test_a_planted_fault_is_found(with_faults, fault, tables):
    assert found(with_faults[fault]) == tables


@pytest.mark.parametrize(
    ("world_size", "shape", "options"),
    [
        (4, "llama", "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 --mft-loss sample"),
        (2, "tied", "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 30001"),
        (2, "q/k norm", "--pipeline-model-parallel-size 2 --mft-loss focal-sample"),
        (2, "experts", "--expert-model-parallel-size 2 --moe-aux-loss-coeff 0 --mft-loss token"),
    ],
)
def test_a_layout_is_certified(prefix, world_size, shape, options):
    lines = compared(prefix, f"{options} --micro-batch-size 1", world_size, shape=shape, steps=2)["none"]
    assert [line for line in lines if not line.holds] == []
    assert max(line.error for line in lines) > 0


def test_weights_of_samples_and_turns_over_an_epoch(tmp_path):
    """Losses by tokens and by samples in bf16: a sound run keeps its bounds, a wrong weight is seen in the shares."""
    prefix = str(tmp_path / "data")
    write_dataset(prefix, LENGTH, longest=60, weighted="samples turns")
    for loss in ("task-token", "task-sample"):
        options = f"--mft-loss {loss} --mft-normalization epoch --bf16 --micro-batch-size 2"
        lines = compared(prefix, options, 1, ("none", "wrong weight"), precision="bf16")
        assert found(lines["none"]) == set()
        assert found(lines["wrong weight"]) == {"share"}
        total = next(line for line in lines["none"] if line.name == "Σ c_t")
        assert total.figures[2] != "1.000000"

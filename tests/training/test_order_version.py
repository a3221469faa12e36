"""The order of the data that a run follows: a new run takes that of the data set, one that resumes keeps its own."""

from types import SimpleNamespace

import pytest

from mft_megatron.batch_sizes import BatchSizes
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.training.loop import next_plan
from mft_megatron.training.progress import Progress
from mft_megatron.training.saving.data_order import order_version
from tests.made_dataset import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("order") / "set"
    write_dataset(prefix, 256)
    return PackedDataset.open(prefix, 256)


def arguments_of(resumed, weights_alone=False):
    """Arguments of a run that resumes from a checkpoint of order version ``resumed``, or is new where that is None."""
    resume = None if resumed is None else SimpleNamespace(info=SimpleNamespace(order_version=resumed))
    return SimpleNamespace(
        resume=resume,
        weights_alone=weights_alone,
        initialization=SimpleNamespace(seed=7),
        batch_sizes=BatchSizes([0], [16]),
        total_packs=None,
        batch_multiple=1,
    )


@pytest.mark.parametrize(
    ("resumed", "weights_alone", "version"), [(None, False, 2), (1, False, 1), (2, False, 2), (1, True, 2)]
)
def test_a_run_keeps_the_order_that_it_began_with(dataset, resumed, weights_alone, version):
    arguments = arguments_of(resumed, weights_alone)
    assert order_version(arguments, dataset) == version
    plan = next_plan(dataset, arguments, Progress(1, 16))
    split = dataset.split("train")
    expected, other = (
        plan_step(split, seed=7, global_batch_size=16, consumed_samples=16, order_version=either).packs_G.tolist()
        for either in (version, 3 - version)
    )
    assert plan.packs_G.tolist() == expected != other

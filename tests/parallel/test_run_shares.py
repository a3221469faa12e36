"""The account of realised shares on several ranks: the same bits on each, and the numbers of the plan."""

import numpy as np
import pytest

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from tests.parallel.run import TASK_WEIGHTS, trainer_and_split
from tests.ranks import run_on_ranks

SIZES = (4, 8, 4)


def plans(split):
    consumed = np.cumsum((0, *SIZES))
    return [
        plan_step(split, seed=1, global_batch_size=size, consumed_samples=int(start))
        for size, start in zip(SIZES, consumed, strict=False)
    ]


def _account(prefix, options, world_size):
    """Train; the account's state on this rank."""
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.training.shares.account import ShareAccount
    from tests.parallel.run import arguments_for

    arguments = arguments_for(prefix, options, world_size)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer, split = trainer_and_split(prefix, options, world_size)
        account = ShareAccount(split, "task-token", arguments.multi_task.mft_normalization)
        for plan in plans(split):
            account.count(plan, trainer.train_step(split, plan, TASK_WEIGHTS))
        state = account.state()
        return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in state.items()}


@pytest.mark.parametrize(
    ("layout", "normalization"),
    [("--micro-batch-size 1", "epoch"), ("--pipeline-model-parallel-size 2", "global")],
)
def test_ranks_agree(dataset_prefix, layout, normalization):
    first, second = run_on_ranks(2, _account, dataset_prefix, f"{layout} --mft-normalization {normalization}", 2)
    assert first == second
    split = PackedDataset.open(dataset_prefix, 128).split("train")
    realised, packs = np.zeros(4), split.num_packs
    for plan in plans(split):
        tokens_K = plan.counts.tokens_K
        if normalization == "epoch":
            realised += TASK_WEIGHTS / TASK_WEIGHTS.sum() * packs * tokens_K / split.totals.tokens_K
        else:
            present = TASK_WEIGHTS * (tokens_K > 0)
            realised += plan.num_packs * present / present.sum()
    np.testing.assert_allclose(first["realised_K"], realised, rtol=1e-12)
    np.testing.assert_allclose(first["target_K"], sum(SIZES) * TASK_WEIGHTS / TASK_WEIGHTS.sum(), rtol=1e-14)

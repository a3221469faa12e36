"""``--mft-normalization epoch`` in the trainer: the shares of an epoch's steps add up to the weights, on two ranks."""

import numpy as np
import pytest

from tests.made_dataset import write_dataset
from tests.parallel.run import TASK_WEIGHTS, arguments_for, open_dataset
from tests.ranks import run_on_ranks

KINDS = {
    "packed": {"longest": 120, "weighted": "samples turns"},
    "padded": {"longest": 120, "padding_mode": "padding", "weighted": "turns"},
    "joined": {"longest": 120, "padding_mode": "concat", "documents": True},
}


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("epoch")
    for name, options in KINDS.items():
        write_dataset(folder / name, 128, split=(80, 20, 0), **options)
    return {name: str(folder / name) for name in KINDS}


def _epoch(prefix, loss):
    """Train an epoch in steps of growing size, the last with empty rows; then one step of all packs, and ``global``.

    Returns:
        Σ c_t·G/E of each task; and loss, gradient norm and Σ c_t of the whole epoch as a step, in both.
    """
    from mft_megatron.data.loading.step_plan import plan_step
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    arguments = arguments_for(prefix, f"--micro-batch-size 2 --mft-loss {loss} --mft-normalization epoch", 2)
    split = open_dataset(arguments).split("train")

    def plan(size, consumed):
        end = split.num_packs
        return plan_step(split, seed=1, global_batch_size=size, consumed_samples=consumed, end=end, batch_multiple=4)

    share_K, consumed, size = np.zeros(4), 0, 0
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, split.dataset.vocab_size, 4)
        while consumed < split.num_packs:
            size = size + 4 if size < 16 else 24
            step = plan(size, consumed)
            report = trainer.train_step(split, step, TASK_WEIGHTS)
            share_K += report.share_K.numpy() * step.num_packs / split.num_packs
            consumed += step.num_packs
        ones = []
        for normalization in ("epoch", "global"):
            arguments = arguments_for(
                prefix, f"--micro-batch-size 2 --mft-loss {loss} --mft-normalization {normalization}", 2
            )
            trainer = Trainer(arguments, split.dataset.vocab_size, 4)
            report = trainer.train_step(split, plan(4 * split.num_packs, 0), TASK_WEIGHTS)
            ones.append((report.loss, report.grad_norm, *report.share_K.tolist()))
    return share_K, ones


@pytest.mark.parametrize(
    ("kind", "loss"), [("packed", "task-sample"), ("padded", "task-token"), ("joined", "task-token")]
)
def test_an_epoch_gives_every_task_its_weight(prefixes, kind, loss):
    for share_K, (epoch, whole) in run_on_ranks(2, _epoch, prefixes[kind], loss):
        np.testing.assert_allclose(share_K, TASK_WEIGHTS / TASK_WEIGHTS.sum(), rtol=1e-12)
        assert epoch[2:] == pytest.approx(whole[2:], rel=1e-12)
        assert epoch[:2] == pytest.approx(whole[:2], rel=1e-6)

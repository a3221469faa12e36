"""Saves of a run plan twice and later exchange results of writing alone, and hold what a save by itself holds."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from mft_megatron.run_folder.names import iteration_folder
from tests.parallel.run import arguments_for, info_of_step, plans_of, trainer_and_split
from tests.ranks import run_on_ranks
from tests.saved_checkpoints import tensors_of

SHARDED = "--use-distributed-optimizer --save"


def _save_four_times(prefix, folder, options, world):
    """Save before the first step and after each of three with one writer, and the last state by itself as well.

    Returns:
        how often this rank gathered Python objects from other ranks in each save with the one writer.
    """
    import torch.distributed as dist

    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups

    counts = [0]
    for name in ("gather_object", "all_gather_object"):
        gather = getattr(dist, name)

        def counted(*arguments, gather=gather, **keywords):
            counts[-1] += 1
            return gather(*arguments, **keywords)

        for module in (dist, dist.distributed_c10d):
            setattr(module, name, counted)
    words = f"{SHARDED} {folder} {options}"
    arguments = arguments_for(prefix, words, world)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, words, world)
        writer = checkpoint.Writer(arguments.checkpoint)
        for step, plan in enumerate([None, *plans_of(split, 1, steps=3)]):
            if plan is not None:
                trainer.train_step(split, plan, np.ones(4))
            counts.append(0)
            writer.save(Path(folder), trainer, info_of_step(step), {"step": step})
            writer.finish()
        counts.append(0)
        by_itself = dataclasses.replace(arguments.checkpoint, async_save=False)
        checkpoint.save(Path(f"{folder}/by itself"), trainer, info_of_step(3), by_itself, {"step": 3})
    return counts[1:5]


@pytest.mark.parametrize("options", ["", "--bf16 --async-save --tensor-model-parallel-size 2"])
def test_plans_are_kept_and_followed(dataset_prefix, tmp_path, options):
    of_ranks = run_on_ranks(2, _save_four_times, dataset_prefix, str(tmp_path), options, 2)
    for before_steps, first, second, third in of_ranks:
        # the optimizer's states are new in the second save, which plans again; results of writing are always gathered
        assert before_steps == first > second > third == 1
    saved, expected = (tensors_of(iteration_folder(folder, 3)) for folder in (tmp_path, tmp_path / "by itself"))
    assert saved.keys() == expected.keys()
    assert all(saved[name].equal(expected[name]) for name in saved)
    numbers = [torch.load(iteration_folder(tmp_path, step) / "common.pt")["training"] for step in range(4)]
    assert numbers == [{"step": step} for step in range(4)]

"""Saves write the bytes that Megatron-Core would write, and the manifest has the hashes of all of them."""

from pathlib import Path

import numpy as np
import pytest

from mft_megatron.run_folder.description import read_info
from mft_megatron.run_folder.file_hash import hash_file
from mft_megatron.run_folder.manifest import read_manifest
from mft_megatron.run_folder.names import INFO, MANIFEST, iteration_folder
from tests.parallel.run import arguments_for, info_of_step, plans_of, trainer_and_split
from tests.ranks import run_on_ranks


def _save(prefix, folder, options, world):
    """Save after a step, and write the same state with Megatron-Core's own strategy."""
    import queue

    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.platform.releases import accepted

    words = f"{options} --save {folder}"
    arguments = arguments_for(prefix, words, world)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, words, world)
        trainer.train_step(split, next(iter(plans_of(split, 1, steps=1))), np.ones(4))
        checkpoint.save(Path(folder), trainer, info_of_step(1), arguments.checkpoint, {"step": 1})
        theirs = Path(folder) / "theirs"
        if dist.get_rank() == 0:
            theirs.mkdir()
        dist.barrier()
        state = checkpoint.state_to_save(trainer, arguments.checkpoint, {"step": 1}, True)
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
        if world > 1:
            strategy = FullyParallelSaveStrategyWrapper(strategy, checkpoint._replicas())
        filesystem_async._results_queue = queue.SimpleQueue()
        options = accepted(dist_checkpointing.save, async_strategy="mcore")
        dist_checkpointing.save(state, str(theirs), sharded_strategy=strategy, **options)


@pytest.mark.parametrize("options", ["--use-distributed-optimizer", "--bf16 --async-save"])
def test_files_are_those_of_megatron_core_and_the_manifest_has_all(dataset_prefix, tmp_path, options):
    run_on_ranks(2, _save, dataset_prefix, str(tmp_path), options, 2)
    path, theirs = iteration_folder(tmp_path, 1), tmp_path / "theirs"
    files = read_manifest(path, read_info(path).manifest)
    there = {file.name: hash_file(file) for file in path.iterdir() if file.name not in (INFO, MANIFEST)}
    assert files == there
    weights = {file.name: file.read_bytes() for file in theirs.glob("*.distcp")}
    assert weights == {file.name: file.read_bytes() for file in path.glob("*.distcp")}
    assert len(weights) >= 2
    assert {file.name for file in theirs.iterdir()} | {"common.pt"} == set(files)

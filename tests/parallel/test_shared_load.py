"""Each byte of a checkpoint's tensors is read by one rank of those that need it; all ranks say why one cannot read."""

from pathlib import Path

import pytest

from tests.parallel.run import arguments_for, info_of_step, plans_of, trainer_and_split
from tests.ranks import run_on_ranks

# several buckets, so that the ranks' slices of the states cut weights
BUCKETS = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 30001"
EXPERTS = "--expert-model-parallel-size 2 --micro-batch-size 1"


def _save(prefix, folder, options, world, shape):
    """Train a step and save."""
    import numpy as np

    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, options, world, shape)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, options, world, shape)
        trainer.train_step(split, plans_of(split, 1)[0], np.ones(4))
        checkpoint.save(Path(folder), trainer, info_of_step(1), arguments.checkpoint)


def _load(prefix, folder, options, world, shape, fails=None):
    """Load the checkpoint.

    Args:
        fails: the rank that cannot read tensors, for an error of its disk.

    Returns:
        bytes of tensors in the checkpoint, bytes of them that this rank read, its error, and whether it needed memory
        for more than its states, the moments that the optimizer allocates, and three of the largest stored tensors.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.planner import LoadItemType

    from mft_megatron.errors import InputError
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.run_folder.found import latest_checkpoint
    from tests.live_bytes import Peak

    read, read_data = [], FileSystemReader.read_data

    def counted(self, plan, planner):
        tensors = [item.storage_index for item in plan.items if item.type == LoadItemType.TENSOR]
        if tensors and dist.get_rank() == fails:
            raise OSError(5, "Input/output error")
        read.extend(self.storage_data[index].length for index in tensors)
        return read_data(self, plan, planner)

    FileSystemReader.read_data = counted
    arguments = arguments_for(prefix, options, world, shape)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, _ = trainer_and_split(prefix, options, world, shape)
        path, info = (newest := latest_checkpoint(folder)).path, newest.info
        stored = FileSystemReader(path).read_metadata()
        sizes = [where.length for index, where in stored.storage_data.items() if index.offset is not None]
        elements = sum(weight.numel() for chunk in trainer.chunks for weight in chunk.parameters())
        said = None
        with Peak() as live:
            try:
                checkpoint.load(path, trainer, info, arguments.checkpoint)
            except InputError as error:
                said = str(error)
        return sum(sizes), sum(read), said, live.peak > 1.05 * (12 + 8) * elements / world + 3 * max(sizes)


@pytest.mark.parametrize(
    ("shape", "options"),
    [("llama", BUCKETS), pytest.param("experts", f"{BUCKETS} {EXPERTS}", marks=pytest.mark.slow)],
)
def test_each_byte_is_read_once(dataset_prefix, tmp_path, shape, options):
    run_on_ranks(2, _save, dataset_prefix, str(tmp_path), options, 2, shape)
    results = run_on_ranks(2, _load, dataset_prefix, str(tmp_path), options, 2, shape)
    all_bytes = results[0][0]
    assert sum(read for _, read, *_ in results) == all_bytes
    assert max(read for _, read, *_ in results) < 0.55 * all_bytes
    assert [said for *_, said, _ in results] == [None, None]
    assert shape != "llama" or not any(too_much for *_, too_much in results)
    failed = run_on_ranks(2, _load, dataset_prefix, str(tmp_path), options, 2, shape, 1)
    assert len({said for *_, said, _ in failed}) == 1
    assert "iter_0000001: cannot be read ([Errno 5] Input/output error); the checkpoint is damaged" in failed[0][2]

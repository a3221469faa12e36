"""A rehearsal of a save: all ranks write a few bytes as a save does, so that its cost is known before it is needed.

It also shows at the start, and not hours later, that each rank can write into the run folder.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
import functools
import io
import shutil
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from mft_megatron.mcore.parallel import process_groups, timeouts
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder.publishing import new_token, sync_folder, unfinished_folder

from .agreement import agree, failure_of, on_main, removed_after_error
from .background import Background
from .part_files import PartFile, write_files

# how a rank cannot write, and what becomes of the run
_IN_WORDS = (" in a rehearsal of a save", "nothing was trained: make room, or choose another --save")
# tensors of a weight's states by kind of optimizer
_STATES = {"adam": 2, "sgd": 1}
# bytes that all ranks write together
MOST_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """Result of a rehearsal.

    Attributes:
        bytes: written by all ranks together.
        seconds: until all of them were on the disk.
    """

    bytes: int
    seconds: float

    def estimate(self, size: int) -> float:
        """Seconds in which a save of ``size`` bytes is written, if the disk keeps its pace."""
        return self.seconds * max(1.0, size / self.bytes)


def bytes_of_save(trainer: Trainer) -> int:
    """Bytes of the tensors of a checkpoint when the optimizer has states, about; a collective of all ranks.

    Args:
        trainer: its weights are counted, and the states that its options give them.
    """
    a = trainer.arguments
    everything, trained = trainer.num_parameters(), trainer.num_parameters(trained=True)
    weight = 4 if a.precision.name == "fp32" else 2
    # states in fp32, and a main weight where weights have 16 bits
    states = _STATES.get(a.optimizer_states, 0) + (weight == 2) if a.checkpoint.save_optim else 0
    return (everything if a.saves_base else trained) * weight + trained * states * 4


@timeouts.long_waits()
def rehearse(folder: Path, size: int, in_background: bool) -> Rehearsal:
    """Write up to 16 MiB into a run folder and remove them; a collective of all ranks.

    Args:
        folder: the run folder.
        size: bytes of a checkpoint; no more are written.
        in_background: let the processes write that write with ``--async-save``.

    Raises:
        SaveError: a rank cannot write there; on every rank.
    """
    ranks = dist.get_world_size()
    unfinished = unfinished_folder(folder, 0, process_groups.of_all_ranks(new_token())[0])
    share = max(1, min(size, MOST_BYTES) // ranks)
    write = functools.partial(write_files, [_file(unfinished, share)])
    start = time.perf_counter()
    with removed_after_error(unfinished):
        on_main(folder, lambda: unfinished.mkdir(parents=True), *_IN_WORDS)
        agree(folder, failure_of(lambda: Background(write).result() if in_background else write()), *_IN_WORDS)
        on_main(folder, lambda: sync_folder(unfinished), *_IN_WORDS)
    seconds = max(process_groups.of_all_ranks(time.perf_counter() - start))
    on_main(folder, lambda: shutil.rmtree(unfinished), *_IN_WORDS)
    return Rehearsal(share * ranks, seconds)


def _file(folder: Path, size: int) -> PartFile:
    """A file of this rank with bytes that no file system can make fewer."""
    rank = dist.get_rank()
    content = io.BytesIO(np.random.default_rng(rank).bytes(size))
    item = WriteItem(MetadataIndex("rehearsal"), WriteItemType.BYTE_IO)
    name = f"__{rank}_0.distcp"
    return folder / name, name, ([(item, content)], [])

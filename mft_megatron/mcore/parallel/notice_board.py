"""Notices that ranks leave for each other without a collective: in the store by which they found each other.

The store is a server in torchrun's process, or in that of rank 0 where srun or mpirun starts the ranks. Each rank has a
connection of its own for this: the one of the process groups may be in use by a thread that hangs. Any call may hang
where the server's process is stopped.
"""

import os
from collections.abc import Collection
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from mft_megatron.run_folder.outcome import start_name

# of one call that the server answers
TIMEOUT = timedelta(seconds=3)


class NoticeBoard:
    """Notices of all ranks of this start of a job; calls raise torch's errors where the store cannot be reached."""

    def __init__(self, rank: int, world_size: int):
        """Prepare; nothing is connected yet.

        Args:
            rank: of this process.
            world_size: number of ranks.
        """
        self._rank, self._world_size = rank, world_size
        self._prefix = f"mft watchdog/{start_name(os.environ)}"
        self._connection: TCPStore | None = None

    @staticmethod
    def ready() -> bool:
        """Whether the ranks have found each other, so that the store is there."""
        return dist.is_initialized()

    @property
    def connected(self) -> bool:
        """Whether this rank has posted or asked before."""
        return self._connection is not None

    def post(self, text: str) -> None:
        """Replace this rank's notice."""
        self._store.set(self._notice(self._rank), text)

    def notices(self, ranks: Collection[int] | None = None) -> dict[int, str]:
        """The newest notice of each of some or all ranks that has posted one."""
        ranks = range(self._world_size) if ranks is None else ranks
        if not self._store.check([self._notice(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if self._store.check([self._notice(rank)])]
        texts = self._store.multi_get([self._notice(rank) for rank in ranks])
        return {rank: text.decode() for rank, text in zip(ranks, texts, strict=True)}

    def complete(self) -> bool:
        """Whether every rank has posted a notice."""
        return bool(self._store.check([self._notice(rank) for rank in range(self._world_size)]))

    def agree(self, name: str, value: str) -> str:
        """Propose a value; returns the one that was proposed first, the same on all ranks."""
        found: bytes = self._store.compare_set(self._key(name), "", value)
        return found.decode()

    def has(self, name: str) -> bool:
        """Whether a value has been proposed for a name."""
        return bool(self._store.check([self._key(name)]))

    @property
    def _store(self) -> TCPStore:
        if self._connection is None:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._connection = TCPStore(address, port, is_master=False, timeout=TIMEOUT, wait_for_workers=False)
        return self._connection

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _notice(self, rank: int) -> str:
        return self._key(f"rank {rank}")

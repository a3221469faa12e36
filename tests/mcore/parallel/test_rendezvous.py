"""Ranks of one attempt of torchrun find each other, and not those of the attempt before, in the store that it lends."""

import datetime
import threading
import time

import pytest
import torch.distributed as dist

from mft_megatron.errors import InputError
from mft_megatron.mcore.parallel import rendezvous

LONG = datetime.timedelta(seconds=30)


@pytest.fixture
def clients(monkeypatch):
    """A function that connects another client to one store."""
    monkeypatch.setattr(rendezvous, "_INTERVAL", 0.01)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=LONG, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=LONG)


def attempt(clients, world_size, late=None, tokens=()):
    """Names that the ranks of an attempt get; rank ``late`` starts last."""
    names = [None] * world_size

    def run(rank):
        token = tokens[rank] if tokens else ""
        names[rank] = rendezvous.agree(clients(), rank, world_size, 20, token)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for rank, thread in enumerate(threads):
        if rank != late:
            thread.start()
    if late is not None:
        time.sleep(0.1)
        threads[late].start()
    for thread in threads:
        thread.join(20)
    return names


@pytest.mark.parametrize("late", [0, 2])
def test_each_attempt_has_a_name_of_its_own_that_all_its_ranks_know(clients, late):
    first, second = attempt(clients, 3, late), attempt(clients, 3, late)
    assert len(set(first)) == len(set(second)) == 1
    assert None not in first + second
    assert first != second


def test_a_rank_alone_names_its_attempt(clients):
    assert attempt(clients, 1) != attempt(clients, 1)


def test_ranks_that_do_not_come_are_named(clients):
    with pytest.raises(InputError, match=r"2 rank\(s\) did not start: rank 1, rank 2"):
        rendezvous.agree(clients(), 0, 3, 0.05)


def test_without_torchrun_torch_finds_the_ranks():
    assert rendezvous.store_of_attempt({"RANK": "0", "WORLD_SIZE": "1"}, LONG) == {}

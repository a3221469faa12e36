"""A process group of any size in one process: no message is sent, and objects of other ranks are this rank's own."""

from typing import Any

import torch.distributed as dist

from .cuda_functions import META
from .listener import listener


def start(rank: int, world_size: int) -> None:
    """Start the world as one of its ranks.

    Args:
        rank: which this process is.
        world_size: number of ranks.
    """
    from torch.testing._internal.distributed import fake_pg

    # torch registers this backend for devices of which it knows that they have one
    dist.Backend._plugins.pop("FAKE", None)
    dist.Backend.register_backend(
        "fake", fake_pg._create_fake_pg, extended_api=True, devices=["cpu", "cuda", META.type]
    )
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=world_size)


def replace_object_collectives() -> None:
    """Give every rank's object the value of this rank's, and count that the host waits for them."""

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        listener().waited("value")
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, *arguments: Any, **options: Any) -> None:
        listener().waited("value")
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def broadcast_object_list(object_list: list[Any], *arguments: Any, **options: Any) -> None:
        listener().waited("value")

    for module in (dist, dist.distributed_c10d):
        for function in (all_gather_object, gather_object, broadcast_object_list):
            setattr(module, function.__name__, function)


def replace_coalescing() -> None:
    """Let Megatron-Core's data parallelism send messages one by one: the simulated group knows no other way."""
    import contextlib

    from megatron.core.distributed import param_and_grad_buffer

    class Done:
        def wait(self, *arguments: object) -> bool:
            return True

    @contextlib.contextmanager
    def one_by_one(*arguments: Any, **options: Any) -> Any:
        yield Done()

    param_and_grad_buffer._coalescing_manager = one_by_one

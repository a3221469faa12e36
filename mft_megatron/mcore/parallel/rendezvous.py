"""The store through which the ranks of one attempt of torchrun find each other, apart from attempts before it.

torchrun starts all ranks again after one has failed, and with ``--standalone`` or ``--rdzv-backend c10d`` it lends them
the same store. Newer releases of torch (seen in 2.13 and 2.14) take it as it is, with the addresses of ranks that have
ended, and the new ones wait for those until the timeout. The count of restarts cannot tell attempts apart, since it is
each machine's own. So rank 0 names the attempt, and a rank accepts a name only where its own token is among those that
rank 0 has seen.
"""

import datetime
import json
import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from torch._C._distributed_c10d import PrefixStore, TCPStore

from mft_megatron.errors import InputError

# seconds between two looks into the store
_INTERVAL = 0.1


class Store(Protocol):
    """The methods of torch's store that are needed here."""

    def set(self, key: str, value: str) -> None:
        """Set a key."""

    def get(self, key: str) -> bytes:
        """Get a key, which must be there or is waited for."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Get several keys."""


def store_of_attempt(environment: Mapping[str, str], timeout: datetime.timedelta) -> dict[str, Any]:
    """Arguments of ``init_process_group`` for a rank that torchrun started with a store of its own; else none.

    Args:
        environment: of the rank.
        timeout: of the store, and until all ranks have to be there.

    Raises:
        InputError: ranks are missing.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return {}
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    name = agree(store, rank, world_size, timeout.total_seconds())
    return {"store": PrefixStore(f"mft/{name}", store), "rank": rank, "world_size": world_size}


def agree(store: Store, rank: int, world_size: int, seconds: float, token: str = "") -> str:
    """Return the name that rank 0 gives this attempt; a collective of its ranks.

    Args:
        store: shared by all ranks, perhaps with the keys of earlier attempts.
        rank: of this process.
        world_size: number of ranks.
        seconds: until all ranks have to be there.
        token: of this process, which no other one has; made up if empty.

    Raises:
        InputError: ranks are missing.
    """
    token = token or uuid.uuid4().hex[:16]
    end = time.monotonic() + seconds
    if rank == 0:
        store.set("mft/attempt", token)
        keys = [f"mft/{token}/rank {other}" for other in range(1, world_size)]
        while keys and not store.check(keys):
            _refuse_after(end, [key for key in keys if not store.check([key])])
        tokens = [value.decode() for value in store.multi_get(keys)] if keys else []
        store.set(f"mft/{token}/ranks", json.dumps(tokens))
        return token
    said = ""
    while True:
        name = store.get("mft/attempt").decode()
        if name != said:
            store.set(f"mft/{name}/rank {rank}", token)
            said = name
        if store.check([f"mft/{name}/ranks"]) and token in json.loads(store.get(f"mft/{name}/ranks")):
            return name
        _refuse_after(end, ["mft/rank 0"])


def _refuse_after(end: float, missing: list[str]) -> None:
    if time.monotonic() > end:
        names = ", ".join(key.rpartition("/")[2] for key in missing[:8])
        raise InputError(f"{len(missing)} rank(s) did not start: {names}; see their machines", always=True)
    time.sleep(_INTERVAL)

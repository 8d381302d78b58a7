"""The store over which this life's ranks meet, out of sight of what the ranks of an earlier life left in it.

torchrun's agents keep one TCPStore through all restarts, and torch does not tell the lives apart: a restarted rank
may read the address of a process that is dead and fail to connect (seen with torch 2.13, with several agents and with
the static rendezvous). So the ranks first agree on a prefix that is theirs alone.
"""

import hashlib
import json
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

_POLL_S = 0.05
_AGAIN_S = 1.0


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """(store, rank, world size) from the launcher's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises:
        torch.distributed.DistNetworkError, DistStoreError: the store cannot be reached, or a rank did not come.
    """
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"axpo/here/{rank}", me)
    prefix = _call(store, size, deadline) if rank == 0 else _answer(store, rank, me, deadline)
    return PrefixStore(prefix, store), rank, size


def _call(store: Store, size: int, deadline: float) -> str:
    """Rank 0 reads out who is here, again and again, until each of them has answered to the same list."""
    while time.monotonic() < deadline:
        roster = [store.get(f"axpo/here/{rank}").decode() for rank in range(size)]
        prefix = _prefix(roster)
        store.set("axpo/roster", json.dumps(roster))
        answers, again = [f"{prefix}/yes/{rank}" for rank in range(1, size)], time.monotonic() + _AGAIN_S
        while time.monotonic() < again:
            if size == 1 or store.check(answers):
                store.set(f"{prefix}/go", "")
                return prefix
            time.sleep(_POLL_S)
    raise dist.DistStoreError("not every rank answered")


def _answer(store: Store, rank: int, me: str, deadline: float) -> str:
    """Another rank answers to a list with itself on it, not with an earlier life of itself."""
    while time.monotonic() < deadline:
        roster = json.loads(store.get("axpo/roster"))
        prefix = _prefix(roster)
        if len(roster) > rank and roster[rank] == me:
            store.set(f"{prefix}/yes/{rank}", "")
            if store.check([f"{prefix}/go"]):
                return prefix
        time.sleep(_POLL_S)
    raise dist.DistStoreError("rank 0 did not call this rank")


def _prefix(roster: list[str]) -> str:
    return f"axpo/life/{hashlib.sha256(json.dumps(roster).encode()).hexdigest()[:16]}"

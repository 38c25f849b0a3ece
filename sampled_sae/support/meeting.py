"""How the processes of one start find each other: a store that all of them share, and no earlier start has written to.

torchrun keeps one store over its restarts, where the addresses of processes that are gone still stand. The number of
restarts does not tell them apart: it counts those of one machine.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .all_ranks import DIMENSIONS, AllRanks, ranks_of
from .launch import Launch

TIMEOUT = 600.0
_LOOK_SECONDS = 0.05


def start(launch: Launch, cuda: bool, feature_shards: int, timeout: float = TIMEOUT) -> AllRanks:
    """Joins the processes that torchrun or SLURM has started: data x feature shards, neighbours in the latter.

    Args:
        launch: which of them this is.
        cuda: NCCL between GPUs; else gloo alone.
        feature_shards: ranks that share one dictionary.
        timeout: seconds after which a rank that does not answer is given up.

    Raises:
        ValueError: a number of shards that the processes cannot be divided by.
    """
    if launch.size % feature_shards:
        raise ValueError(f"feature_shards={feature_shards}: must divide the {launch.size} processes")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    patience = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=patience))
    store = meet(store, rank, size, patience)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    layout = (launch.size // feature_shards, feature_shards)
    ranks = ranks_of(dist.init_device_mesh("cuda" if cuda else "cpu", layout, mesh_dim_names=DIMENSIONS))
    ranks.set_timeout(patience)
    return ranks


def meet(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """The part of `store`, a `torch.distributed.Store`, that belongs to this start. All ranks call it.

    Each asks under a name of its own, and the first rank answers all who have ever asked until all are there.

    Raises:
        TimeoutError: some did not come.
    """
    end = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        start = uuid.uuid4().hex
        answered = 0
        while (here := store.add(f"{start}/here", 0)) < size - 1:
            asked = store.add("meeting/asked", 0)
            for number in range(answered + 1, asked + 1):
                store.set(store.get(f"meeting/{number}").decode(), start)
            answered = asked
            if time.monotonic() > end:
                raise TimeoutError(f"{here + 1} of {size} processes came within {timeout.total_seconds():g} seconds")
            time.sleep(_LOOK_SECONDS)
    else:
        name = f"meeting/{uuid.uuid4().hex}"
        store.set(f"meeting/{store.add('meeting/asked', 1)}", name)
        try:
            store.wait([name], timeout)
        except RuntimeError as error:
            raise TimeoutError(f"the first process did not come within {timeout.total_seconds():g} seconds") from error
        start = store.get(name).decode()
        store.add(f"{start}/here", 1)
    return dist.PrefixStore(start, store)

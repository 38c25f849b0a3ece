"""A store that all processes of one start share, and no earlier start has written to.

torchrun keeps one store over its restarts, where the addresses of processes that are gone still stand. The number of
restarts does not tell them apart: it counts those of one machine.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_LOOK_SECONDS = 0.05


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

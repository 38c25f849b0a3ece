"""CPU memory without page faults.

A fresh allocation of some megabytes comes from the system page by page: one fault for each 4 KiB costs more
than writing the 4 KiB. numpy asks for huge pages, which torch does not, and memory that was used before costs
nothing. On other devices torch's own caching allocator does this.
"""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

KEPT_SCRATCH = 1 << 26
# numpy knows no bfloat16: the same bytes by another name
DTYPES = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16}


def on_huge_pages(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(shape)`, on huge pages where the system grants them."""
    if like.device.type != "cpu" or like.dtype not in DTYPES:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(shape, DTYPES[like.dtype])).view(like.dtype)


class Workspace:
    """Hands out tensors on memory that is used again once the last tensor on it is gone.

    It holds as many blocks as were in use at once, and lets go of those that have become too small.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """`like.new_empty(shape)`."""
        if like.device.type != "cpu" or like.dtype not in DTYPES:
            return like.new_empty(shape)
        size = math.prod(shape) * like.element_size()
        free = [i for i, (_, user) in enumerate(self._blocks) if user() is None]
        fitting = [i for i in free if self._blocks[i][0].nbytes >= size]
        if fitting:
            at = min(fitting, key=lambda i: self._blocks[i][0].nbytes)
        else:
            self._blocks = [block for i, block in enumerate(self._blocks) if i not in free]
            at = len(self._blocks)
            # Room to grow by an eighth: pages that are never touched cost nothing.
            memory = np.empty(size + size // 8, np.uint8)
            self._blocks.append((memory, weakref.ref(memory)))
        memory = self._blocks[at][0]
        view = memory[:size].view(DTYPES[like.dtype]).reshape(shape)
        self._blocks[at] = memory, weakref.ref(view)
        return torch.from_numpy(view).view(like.dtype)

    # of a copy too
    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()


_local = threading.local()


def forget_scratch() -> None:
    """Lets go of this thread's memory, so that what a call takes of it can be measured."""
    _local.workspace = Workspace()


def scratch(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(shape)` for a short while: memory that each thread keeps for its next call."""
    if math.prod(shape) * like.element_size() > KEPT_SCRATCH:
        return on_huge_pages(like, *shape)
    if not hasattr(_local, "workspace"):
        _local.workspace = Workspace()
    return _local.workspace.empty(like, *shape)

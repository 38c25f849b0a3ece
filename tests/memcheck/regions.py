"""Each pointer argument of a launch in an address space of its own, and what it may reach there.

The interpreter computes with the addresses of the tensors in memory, where one tensor ends as the next begins. Here
argument k begins at k << 40 (and a half), so that an address says from which argument it was computed, however wrong
it is. Before memory is touched it becomes the real one again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

SPACE = 40
MIDDLE = 1 << (SPACE - 1)


class Region:
    """What one argument may reach: the elements of its tensor, not the holes of a strided view.

    start, stop: addresses of the memory that it lies in, with all that arguments share of it: storages of torch, which
    may overlap where numpy made them. unit: bytes of the smallest elements that any argument has there.
    """

    def __init__(self, index: int, tensor: torch.Tensor) -> None:
        self.index = index
        self.base = (index << SPACE) + MIDDLE
        self.real = tensor.data_ptr()
        self.width = self.unit = tensor.element_size()
        self.start = tensor.untyped_storage().data_ptr()
        self.stop = self.start + tensor.untyped_storage().nbytes()
        self.shape, self.strides = tuple(tensor.shape), tensor.stride()
        sizes = [*zip(self.shape, self.strides)]
        self.extent = 0 if 0 in self.shape else 1 + sum((size - 1) * stride for size, stride in sizes)
        self.elements: np.ndarray | None = None
        if self.extent != tensor.numel():
            at = np.zeros(1, np.int64)
            for size, stride in sizes:
                at = (at[:, None] + np.arange(size) * stride).ravel()
            self.elements = np.zeros(self.extent, bool)
            self.elements[at] = True

    def holds(self, offsets: np.ndarray) -> np.ndarray:
        """Which byte offsets from `base` are where an element begins."""
        inside = (offsets >= 0) & (offsets < self.extent * self.width) & (offsets % self.width == 0)
        if self.elements is not None and inside.any():
            inside &= self.elements[np.where(inside, offsets // self.width, 0)]
        return inside


class Access(NamedTuple):
    """The lanes of one load, store or atomic.

    real: uint64, where they go in memory. good: those that may. parts: (region, its good lanes). bad: (how many lanes,
    what is wrong with them).
    """

    real: np.ndarray
    good: np.ndarray
    parts: list[tuple[Region, np.ndarray]]
    bad: list[tuple[int, str]]


class AddressSpaces:
    """The arguments of one launch, in their order."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, tensor: torch.Tensor) -> int:
        """The address under which a kernel is given the tensor."""
        region = Region(len(self.regions) + 1, tensor)
        shared = [other for other in self.regions if other.start < region.stop and region.start < other.stop]
        self.regions.append(region)
        shared.append(region)
        start, stop = min(part.start for part in shared), max(part.stop for part in shared)
        unit = min(part.width for part in shared)
        for part in shared:
            part.start, part.stop, part.unit = start, stop, unit
        return region.base

    def access(self, pointers: np.ndarray, mask: np.ndarray) -> Access:
        """Where the active lanes go."""
        addresses = pointers.astype(np.int64)
        space = addresses >> SPACE
        mask = np.broadcast_to(mask.astype(bool), addresses.shape)
        found = Access(np.zeros_like(addresses), np.zeros(addresses.shape, bool), [], [])
        for index in np.unique(space[mask]):
            mine = mask & (space == index)
            if not 1 <= index <= len(self.regions):
                found.bad.append((mine.sum(), "far from every argument"))
                continue
            region = self.regions[index - 1]
            offsets = addresses - region.base
            inside = mine & region.holds(offsets)
            if (outside := mine & ~inside).any():
                far = offsets[outside] // region.width
                where = (
                    f"elements {far.min()} to {far.max()} of pointer {index} {region.shape}, strides {region.strides}"
                )
                found.bad.append((outside.sum(), where))
            found.real[inside] = offsets[inside] + region.real
            found.good[inside] = True
            found.parts.append((region, inside))
        return found._replace(real=found.real.astype(np.uint64))

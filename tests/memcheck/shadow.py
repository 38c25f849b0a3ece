"""Who touched each byte during a launch, and which two accesses of it collide.

- race: two programs touch one element, one of them writes, and not both by atomics; in whatever order they ran here.
- duplicate: two lanes of one store write different values to one address.
- same program: one program touches an element twice, one a write, without `tl.debug_barrier` between. On a GPU that is
  right only where the same thread owns the element both times: a suspect, to be judged by the layouts in the TTGIR.

It knows nothing of caches, of memory ordering or of warps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .regions import Access, Region

# (kind, index of the other access's site, lanes)
Collision = tuple[str, int, int]
NOBODY = -1


class Touched:
    """The last access of one sort, byte by byte: by which program, between which barriers, from which line.

    And whether it was not the first program.
    """

    def __init__(self, size: int) -> None:
        self.program, self.epoch = np.full(size, NOBODY, np.int32), np.full(size, NOBODY, np.int32)
        self.site = np.zeros(size, np.int32)
        self.several = np.zeros(size, bool)

    def note(self, at: np.ndarray, program: int, epoch: int, site: int) -> None:
        self.several[at] = self.by_others(at, program)
        self.program[at], self.epoch[at], self.site[at] = program, epoch, site

    def by_others(self, at: np.ndarray, program: int) -> np.ndarray:
        last = self.program[at]
        return self.several[at] | ((last != NOBODY) & (last != program))

    def collisions(self, kind: str, at: np.ndarray, where: np.ndarray) -> Iterator[Collision]:
        for site in np.unique(self.site[at][where]):
            yield kind, int(site), int((self.site[at][where] == site).sum())


class Shadow:
    """Of one piece of memory."""

    def __init__(self, size: int) -> None:
        self.written, self.read, self.added = Touched(size), Touched(size), Touched(size)

    def load(self, at: np.ndarray, program: int, epoch: int, site: int) -> Iterator[Collision]:
        """`at`: bytes that stand for the elements, each once."""
        for kind, other in (("race: read, another program wrote", self.written), ("race: read, atomic", self.added)):
            yield from other.collisions(kind, at, other.by_others(at, program))
        own = (self.written.program[at] == program) & (self.written.epoch[at] == epoch)
        yield from self.written.collisions("same program: read after write", at, own)
        self.read.note(at, program, epoch, site)

    def store(self, at: np.ndarray, program: int, epoch: int, site: int, atomic: bool) -> Iterator[Collision]:
        kind = "atomic" if atomic else "write"
        for other, name in ((self.written, "wrote"), (self.read, "read")):
            yield from other.collisions(f"race: {kind}, another program {name}", at, other.by_others(at, program))
        if not atomic:
            yield from self.added.collisions("race: write, atomic", at, self.added.by_others(at, program))
        for other, name in ((self.read, "read"), (self.written, "write")):
            own = (other.program[at] == program) & (other.epoch[at] == epoch)
            yield from other.collisions(f"same program: {kind} after {name}", at, own)
        (self.added if atomic else self.written).note(at, program, epoch, site)


class Shadows:
    """Of all memory of one launch."""

    def __init__(self) -> None:
        self._shadows: dict[int, Shadow] = {}

    def note(self, access: Access, step: Callable[[Shadow, np.ndarray], Iterator[Collision]]) -> Iterator[Collision]:
        """`step` of each piece of memory that the lanes touch, with the bytes that stand for their elements, each once.

        Those at which they begin; where arguments of several widths share the memory, so many that all of them meet.
        """
        for region, inside in access.parts:
            if inside.any():
                at = np.unique(access.real[inside].astype(np.int64) - region.start)
                if region.unit < region.width:
                    at = (at[:, None] + np.arange(0, region.width, region.unit)).ravel()
                yield from step(self._of(region), at)

    def _of(self, region: Region) -> Shadow:
        if region.start not in self._shadows:
            self._shadows[region.start] = Shadow(max(region.stop - region.start, 1))
        return self._shadows[region.start]


def is_duplicate(access: Access, values: np.ndarray) -> bool:
    """Whether two lanes store different bits to one address."""
    lanes = np.broadcast_to(values, access.good.shape)[access.good]
    bits = np.ascontiguousarray(lanes).view(f"u{lanes.dtype.itemsize}")
    at, first, inverse = np.unique(access.real[access.good], return_index=True, return_inverse=True)
    return bool(len(at) < len(bits) and (bits[first][inverse] != bits).any())

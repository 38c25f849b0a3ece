"""Lanes: the equal parts of every batch, each of which is read, shuffled and gone on with by itself.

One of as many processes reads one lane. Whoever reads which of them, the batches are the same.
"""

from __future__ import annotations

from collections.abc import Iterator


def share(n: int, which: int, of: int) -> tuple[int, int]:
    """(start, stop) of one of so many parts of n things, equal up to one."""
    return n * which // of, n * (which + 1) // of


def of_lanes(batch_size: int, lanes: int, rows: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """Which tokens of which lanes the tokens `rows`, (start, stop), of a batch are: (lane, start, stop)."""
    for lane in range(lanes):
        first, end = share(batch_size, lane, lanes)
        start, stop = max(first, rows[0]), min(end, rows[1])
        if start < stop:
            yield lane, start - first, stop - first

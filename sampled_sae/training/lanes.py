"""Lanes: the equal parts of every batch, each of which is read, shuffled and gone on with by itself.

One of as many processes reads one lane. Whoever reads which of them, the batches are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..support.even_slices import share


def of_lanes(batch_size: int, lanes: int, rows: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """Which tokens of which lanes the tokens `rows`, (start, stop), of a batch are: (lane, start, stop)."""
    for lane in range(lanes):
        first, end = share(batch_size, lane, lanes)
        start, stop = max(first, rows[0]), min(end, rows[1])
        if start < stop:
            yield lane, start - first, stop - first

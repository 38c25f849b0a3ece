"""Rows of a matrix in a few slices of about the same size."""

from __future__ import annotations

from collections.abc import Iterator

# a product of fewer rows is slow
FEWEST_ROWS = 32


def even_slices(n: int, width: int, most: int) -> Iterator[slice]:
    """Of n rows of that width, as few slices as hold at most so many elements each, or FEWEST_ROWS."""
    n_slices = -(-n // max(FEWEST_ROWS, most // width))
    for i in range(n_slices):
        yield slice(n * i // n_slices, n * (i + 1) // n_slices)

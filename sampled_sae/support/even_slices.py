"""Equal parts, up to one, of so many things."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# a product of fewer rows is slow
FEWEST_ROWS = 32


def share(n: int, which: int, of: int) -> tuple[int, int]:
    """(start, stop) of one of so many parts of n things."""
    return n * which // of, n * (which + 1) // of


def part_of(batch: Tensor, which: int, of: int) -> Tensor:
    """The rows of one of so many parts of a batch [B, ...]."""
    return batch[slice(*share(len(batch), which, of))]


def even_slices(n: int, width: int, most: int) -> Iterator[slice]:
    """Of n rows of that width, as few slices as hold at most so many elements each, or FEWEST_ROWS."""
    n_slices = -(-n // max(FEWEST_ROWS, most // width))
    for i in range(n_slices):
        yield slice(*share(n, i, n_slices))

"""Where a chunk of activations reaches its floor: first in groups of rows, then inside those few.

The largest of a group of rows is taken for columns side by side in memory, which is the fastest pass there is. In
bfloat16 it is taken of the bits as whole numbers: those of floats above 0 sort as their values do, and those of
floats below 0 are negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 16


def places_reaching(a: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [n], in any order: (row, column) where a [R, C], contiguous, is not below its floor; NaN is not.

    floor: [1], or [C'] for the first C' <= C columns, which alone are looked at.
    """
    width = len(floor) if len(floor) > 1 else a.shape[1]
    whole, found = len(a) // GROUP * GROUP, []
    for start, stop, size in ((0, whole, GROUP), (whole, len(a), len(a) - whole)):
        if start == stop:
            continue
        groups = a[start:stop, :width].view(-1, size, width)
        top, least = sortable(groups, floor)
        group, columns = (top.amax(1) < least).logical_not_().nonzero(as_tuple=True)
        inside = groups[group, :, columns]
        below = inside < (floor.index_select(0, columns)[:, None] if len(floor) > 1 else floor)
        at, row = below.logical_not_().nonzero(as_tuple=True)
        rows = group.index_select(0, at).mul_(size).add_(row).add_(start)
        found.append((rows, columns.index_select(0, at)))
    rows, columns = (torch.cat(part) if len(found) > 1 else part[0] for part in zip(*found))
    return rows, columns


def rows_reaching(a: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [n], in any order: (row, column) where a [C, T] is not below the floor [C] of its row; NaN is not.

    For few columns: the largest of a row is all that is taken first.
    """
    top, least = sortable(a, floor)
    rows = (top.amax(1) < least).logical_not_().nonzero().squeeze(1)
    below = a.index_select(0, rows) < floor.index_select(0, rows)[:, None]
    inside, columns = below.logical_not_().nonzero(as_tuple=True)
    return rows.index_select(0, inside), columns


def sortable(a: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Both as numbers that sort as they do where the floor is at least 0; where it is below, all of a lies above."""
    if a.dtype != torch.bfloat16:
        return a, floor
    bits = floor.contiguous().view(torch.int16)
    return a.view(torch.int16), torch.where(floor >= 0, bits, torch.iinfo(torch.int16).min)

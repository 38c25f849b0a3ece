"""Where a chunk of activations reaches the floor of its feature: first in groups of tokens, then inside those few.

The largest of a group of tokens is taken for features side by side in memory, which is the fastest pass there is. In
bfloat16 it is taken of the bits as whole numbers: those of floats above 0 sort as their values do, and those of
floats below 0 are negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 16


def places_reaching(a: Tensor, floor: Tensor) -> Tensor:
    """int64 [n], in any order: where a.flatten() is not below its floor; NaN is not.

    a: [T, C], contiguous, of fewer than 2^31 elements. floor: [1], or [C'] for the first C' <= C columns, which alone
    are looked at.
    """
    n_tokens, stride = a.shape
    width = len(floor) if len(floor) > 1 else stride
    found = []
    whole = n_tokens // GROUP * GROUP
    for start, stop, size in ((0, whole, GROUP), (whole, n_tokens, n_tokens - whole)):
        if start == stop:
            continue
        top, least = sortable(a[start:stop, :width].view(-1, size, width), floor)
        hits = (top.amax(1) < least).logical_not_().flatten().nonzero().squeeze(1).int()
        group = hits // width
        columns = hits - group * width
        first = (group * size + start) * stride + columns
        inside = first[:, None] + torch.arange(0, size * stride, stride, dtype=torch.int32)
        values = a.flatten().index_select(0, inside.flatten()).view(-1, size)
        below = values < (floor.index_select(0, columns)[:, None] if len(floor) > 1 else floor)
        found.append(inside[below.logical_not_()])
    return torch.cat(found).long()


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

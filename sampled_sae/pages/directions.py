"""Decoder rows compared with each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inference.products import unit_rows

# elements of a block of cosines that are held at a time
BLOCK = 1 << 24


@torch.no_grad()
def nearest(W_dec: Tensor, features: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(cosines float32 [P, n], features int64 [P, n]) of the decoder rows nearest to those of `features` int64 [P].

    Largest cosine first; n at most F - 1. Equivalent, for all features and without each one itself, to
    `(unit @ unit.T).topk(n)` with `unit = normalize(W_dec)`.
    """
    unit = unit_rows(W_dec)
    n = min(n, len(unit) - 1)
    cosines, found = [torch.empty(0, n)], [torch.empty(0, n, dtype=torch.int64)]
    for part in features.split(max(1, BLOCK // len(unit))):
        block = unit[part] @ unit.t()
        block[torch.arange(len(part)), part] = -torch.inf
        best = block.topk(n)
        cosines.append(best.values)
        found.append(best.indices)
    return torch.cat(cosines), torch.cat(found)

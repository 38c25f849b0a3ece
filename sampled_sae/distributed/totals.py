"""Sums, extremes and means over the tokens and features of all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import SparseCodes
from ..impl.encoder import Operands
from ..impl.totals import Totals
from .mesh import Mesh
from .ranks import SumForward
from .weights import FEATURES


class SpreadTotals(Totals):
    """Every process learns the same; a gradient is that of its own part."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def mean(self, per_token: Tensor, operands: Operands) -> Tensor:
        part = per_token.sum(0) / operands.whole_shape[0]
        total: Tensor = SumForward.apply(part, self.mesh.data, "loss")
        return total

    def smallest(self, codes: SparseCodes) -> Tensor:
        here = codes.smallest().clone()
        return self.mesh.data.min_(self.mesh.feature.min_(here, "threshold"), "threshold")

    def once(self, x: Tensor) -> Tensor:
        return x if self.mesh.feature.rank == 0 else x.detach()

    def count(self, codes: SparseCodes) -> int:
        return int(self.mesh.sum_(torch.tensor(codes.count(), device=codes.device), "kept entries"))

    def active_mask(self, codes: SparseCodes, members: Tensor | None) -> Tensor:
        mask = codes.active_mask()
        if self.mesh.data.size == 1:
            return mask
        flags = mask if members is None else mask.index_select(0, members)
        flags = self.mesh.data.max_(flags.to(torch.uint8), "active features").bool()
        return flags if members is None else mask.index_copy_(0, members, flags)

    def greatest(self, counts: Tensor) -> Tensor:
        return self.mesh.feature.max_(counts.amax(), "dead features")

    def sum_of_tokens(self, t: Tensor) -> Tensor:
        return self.mesh.data.sum_(t.sum(0), "tokens")

    def max_of_tokens(self, t: Tensor) -> Tensor:
        return self.mesh.data.max_(t.amax() if len(t) else t.new_full((), -torch.inf), "tokens")

    def norm(self, norms: dict[str, Tensor]) -> Tensor:
        if self.mesh.feature.size == 1:
            return super().norm(norms)
        zero = next(iter(norms.values())).new_zeros(())
        squares = {name: norm.square() for name, norm in norms.items()}
        split = torch.stack([squares[name] for name in squares if name in FEATURES] or [zero]).sum()
        split = self.mesh.feature.sum_(split, "gradient norm")
        return (split + sum((squares[name] for name in squares if name not in FEATURES), zero)).sqrt()

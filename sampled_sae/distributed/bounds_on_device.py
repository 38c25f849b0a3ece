"""Bounds on the scores of columns over a mesh, from which the device chooses and tells the host nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..impl.encoder import Operands
from ..impl.ranking import keys_of
from ..impl.rounded_tokens import Looks
from ..impl.torch.scores import finish_scores
from .mesh import Mesh
from .ranking import SpreadRanking


class SpreadBounds(NamedTuple):
    """Of the features here over the tokens of all; see `BoundsOnDevice` (impl/triton/screen_columns.py).

    low, high: float32 [F], of each column's sum. operands: of the tokens here, in full.
    """

    low: Tensor
    high: Tensor
    operands: Operands
    score: str
    looks: Looks
    ranking: SpreadRanking
    mesh: Mesh

    def largest(self, size: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """int64, ascending: which of the features here are among the `size` of highest score, or of highest ln(score) +
        noise [F], of all processes; with which of them are, where those here have room for all."""
        from ..impl.triton.screen_columns import drawn

        bounds = (self.low, self.high) if noise is None else drawn(self.low, self.high, noise, self.score)
        keys, all_here = keys_of(self.settled(*bounds, size), noise), self.mesh.feature.size == 1
        if not (all_here or self.ranking.has_room(self.operands, size)):
            return self.ranking.largest(keys, size), None
        members, taken = self.ranking.candidates(keys, size)
        return members, None if all_here else taken

    def settled(self, low: Tensor, high: Tensor, size: int) -> Tensor:
        """[F]: scores, of which the `size` largest of all processes are right; the columns are ranked by what `low` and
        `high` bound.

        What is left open is computed in full from the tokens here and added up over `data`: as many numbers as there
        are features, so that nobody waits for how many are open.
        """
        from ..impl.triton.screen_columns import open_columns

        x, W, b, scale, *_ = self.operands
        least, greatest, _ = self.ranking.cuts(torch.where(low.isnan(), 0, low), high, size)
        sure = low > greatest
        # NaN compares with nothing: a column whose bounds are none is open
        undecided = ~sure & ~(high < least) & ~(low >= high)
        sums = torch.zeros_like(self.low)
        if len(x):
            found, opened = open_columns(x, W, b, scale, self.score, undecided)
            self.looks.see_columns(len(W), opened)
            sums = torch.where(undecided, found[0], 0)
        sums = self.mesh.data.sum_(sums, "column statistics")
        known = torch.where(sure, torch.inf, self.low)
        return finish_scores(torch.where(undecided, sums, known)[None], self.score)

"""Which columns are the largest among those of all processes of the dimension `feature`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..impl.column_bounds import MOST_UNDECIDED, ColumnBounds, largest_columns
from ..impl.encoder import Operands
from ..impl.ranking import Ranking, gumbel_noise
from .mesh import Mesh
from .weights import Weights

# Multiplications of B tokens and P features of width d, at most, for which all P places of a pool are computed on every
# process: about five such products in a step, a millisecond of a GPU. So long its queue stays empty at least where the
# host waits to learn how many of the features are here.
MOST_ROOM = 1 << 35


class SpreadRanking(Ranking):
    """Columns are those of the features here, and so are the answers."""

    def __init__(self, weights: Weights, mesh: Mesh, waits: bool) -> None:
        self.weights, self.mesh, self.waits = weights, mesh, waits

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Drawn for all features, so that processes draw alike."""
        noise = gumbel_noise(like.new_empty(self.weights.n_features), generator)
        return noise[self.weights.first : self.weights.first + self.weights.n_local]

    def largest(self, keys: Tensor, size: int, most_local: int | None = None) -> Tensor:
        """Ties go to the lower process. That they may be any number here is what a device is waited for.

        most_local: how many keys any process of the dimension `feature` holds at most; that of all features where None.
        """
        if self.mesh.feature.size == 1:
            return super().largest(keys, size)
        mine, taken = self.candidates(keys, size, most_local)
        return mine[taken.nonzero().squeeze(1)]

    def has_room(self, operands: Operands, size: int) -> bool:
        """The same on all processes."""
        if self.waits or self.mesh.feature.size == 1:
            return False
        n_tokens = -(-operands.whole_shape[0] // self.mesh.data.size)
        return n_tokens * size * operands.x.shape[1] <= MOST_ROOM

    def candidates(self, keys: Tensor, size: int, most_local: int | None = None) -> tuple[Tensor, Tensor]:
        """int64, ascending: the `size` largest of the keys here, or all; and which of them are among those of all."""
        most_local = self.weights.most_local if most_local is None else most_local
        # a key of -inf ranks before the places of shorter lists
        keys = keys.clamp_min(torch.finfo(keys.dtype).min)
        mine = self._largest_here(keys, min(size, len(keys)))
        shown = keys.new_full((min(size, most_local),), -torch.inf)
        shown[: len(mine)] = keys[mine]
        of_ranks = self.mesh.feature.gather(shown, "pool")
        taken = torch.zeros_like(of_ranks, dtype=torch.bool)
        taken.view(-1)[self._largest_here(of_ranks.view(-1), size)] = True
        return mine, taken[self.mesh.feature.rank, : len(mine)]

    def _largest_here(self, keys: Tensor, size: int) -> Tensor:
        """int64, ascending; ties to the lower index. Waits for a device only where it may."""
        if self.waits:
            return super().largest(keys, size)
        return keys.sort(descending=True, stable=True).indices[:size].sort().values

    def within(
        self,
        bounds: ColumnBounds,
        size: int,
        keys: Callable[[Tensor], Tensor] = lambda scores: scores,
        most_local: int | None = None,
    ) -> Tensor | None:
        """As `largest_columns`; there have to be more columns than `size`. None on all processes or on none."""
        fine = bounds.high.isfinite().all()
        if self.mesh.feature.size == 1:
            return largest_columns(bounds, size, keys) if bool(fine) else None
        most_local = self.weights.most_local if most_local is None else most_local
        low, high = (keys(t).clamp_min(torch.finfo(torch.float32).min) for t in (bounds.low, bounds.high))
        least, greatest, fine = self.cuts(low, high, size, fine, most_local)
        if not bool(fine):
            return None
        sure = low > greatest
        undecided = (~sure & ~(high < least)).nonzero().squeeze(1)
        unknown = undecided[(bounds.low < bounds.high)[undecided]]
        counts = torch.stack([sure.sum(), *(torch.tensor(len(t)) for t in (undecided, unknown, low))])
        of_ranks = self.mesh.feature.gather(counts, "pool")
        n_sure, _, n_unknown, n_columns = of_ranks.sum(0).tolist()
        if n_unknown > MOST_UNDECIDED * n_columns:
            return None
        scores = bounds.low.clone()
        scores[unknown] = bounds.exact(unknown)
        taken = self.largest(keys(scores)[undecided], size - n_sure, int(of_ranks[:, 1].max()))
        sure[undecided[taken]] = True
        return sure.nonzero().squeeze(1)

    def cuts(
        self, low: Tensor, high: Tensor, size: int, fine: Tensor | bool = True, most: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of all processes the size-th largest of `low`, the one behind that of `high`, and whether all are fine.

        There have to be more columns than `size`. most: columns that a process holds at most.
        """
        n = min(size + 1, self.weights.most_local if most is None else most)
        shown = low.new_full((2, n + 1), -torch.inf)
        shown[:, n] = fine
        for row, t in zip(shown, (low, high)):
            row[: min(n, len(t))] = t.topk(min(n, len(t))).values
        of_ranks = self.mesh.feature.gather(shown, "pool")
        lows, highs = (of_ranks[:, i, :n].flatten().topk(size + 1).values for i in range(2))
        return lows[size - 1], highs[size], (of_ranks[:, 0, n] == 1).all()

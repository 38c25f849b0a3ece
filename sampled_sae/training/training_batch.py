"""`TrainingBatch`: what one step of several SAEs is given."""

from __future__ import annotations

import math
from functools import cached_property

from torch import Tensor

from ..support.all_ranks import AllRanks
from ..support.geometric_median import geometric_median


class TrainingBatch:
    """This rank's activations x [n, d], scaled, and what several SAEs need of the whole batch, computed once.

    Args:
        rows: [n, d], or [n, d_in + d_out] with targets; along the data dimension of `ranks` each has its own tokens.
        ranks: the processes that share the batch.
        tokens: in the whole batch.
        d_in: where the targets begin in a row; None where there are none.

    Attributes:
        x, target: [n, d_in], and [n, d_out] or None. goal: what is reconstructed, of which the figures below are.
    """

    def __init__(self, rows: Tensor, ranks: AllRanks, tokens: int, d_in: int | None) -> None:
        self.x = rows if d_in is None else rows[:, :d_in].contiguous()
        self.target = None if d_in is None else rows[:, d_in:].contiguous()
        self.goal = self.x if self.target is None else self.target
        self._ranks, self._tokens = ranks, tokens

    @cached_property
    def variance(self) -> float:
        """Mean over tokens of the squared distance to their mean, summed over d."""
        mean = self._ranks.sum_(self.goal.sum(0)) / self._tokens
        return float(self._ranks.sum_((self.goal - mean).square().sum(1).sum()) / self._tokens)

    def fvu_of_layers(self, x_hat: Tensor, layers: int) -> list[float]:
        """Of each of several layers, that of its reconstruction in x_hat [n, layers * d]; none of a single one."""
        if layers == 1:
            return []
        mean = self._ranks.sum_(self.goal.sum(0)) / self._tokens
        apart = [(self.goal - other).view(-1, layers, x_hat.shape[1] // layers) for other in (x_hat, mean)]
        errors, deviations = (self._ranks.sum_(t.square().sum((0, 2))).tolist() for t in apart)
        return [error / deviation if deviation else math.nan for error, deviation in zip(errors, deviations)]

    @cached_property
    def square(self) -> float:
        """Mean over tokens of their squared length."""
        return float(self._ranks.sum_(self.goal.square().sum(1).sum()) / self._tokens)

    @cached_property
    def median(self) -> Tensor:
        """Geometric median [d]."""
        ranks = self._ranks
        return geometric_median(
            self.goal, total=lambda t: ranks.sum_(t.sum(0)), greatest=lambda t: ranks.max_(t.amax())
        )

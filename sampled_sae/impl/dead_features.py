"""Tokens since each feature was last selected, and whether any feature may be dead."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..support.cuda_graphs import capturing
from ..support.late_values import LateScalars
from .column_bounds import DecidedColumns
from .encoder import Encoder


class AuxRule(NamedTuple):
    """The dead-feature loss, step 6 of docs/method.md.

    k_aux: features a token. aux_pool: at most so many dead features take part, those of highest column score; None
    for all. score: which one.
    """

    k_aux: int
    aux_pool: int | None = None
    score: str = "l2"


def residual_of(encoder: Encoder, x_hat: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """(target - x_hat, target), [B, d] without gradient; the target is the encoder's x where it is not given."""
    target = (encoder.x if target is None else target).to(x_hat.dtype).detach()
    return target - x_hat.detach(), target


def ranked(scores: Tensor, dead: Tensor) -> Tensor:
    """One bit pattern up: a dead feature of score 0 still ranks above every live one, which get 0."""
    return torch.where(dead, (scores.view(torch.int32) + 1).view(torch.float32), 0)


def settled_ranks(bounds: DecidedColumns, dead: Tensor, size: int) -> Tensor:
    """float32 [F], `ranked`: of these keys the `size` largest, below F, are right, of all processes."""
    scores = bounds.settled(ranked(bounds.low, dead), ranked(bounds.high, dead), size)
    return ranked(scores.clamp(max=torch.finfo(torch.float32).max), dead)


class IdleTokens:
    """Moves the counts, int64 [F], and knows whether their greatest has reached a limit.

    A bound, which grows by B a step, says for how long no count can have. From then on the greatest count of each step
    is on its way to the host while backward and optimizer run, and the next step goes by it: a GPU is not waited for
    beyond the forward pass of the step before.
    The counts are the caller's, who may also move them in other ways: what is known holds for one version of them.
    """

    def __init__(self) -> None:
        self._version, self._bound, self._exact = -1, 0, False
        self._limit = 0
        self._greatest: LateScalars | None = None
        self._captured = False

    @torch.no_grad()
    def count_(
        self,
        counts: Tensor,
        active: Tensor,
        n_tokens: int,
        greatest_of: Callable[[Tensor], Tensor] = torch.amax,
    ) -> None:
        """`counts += n_tokens`, and 0 for the features that have a kept entry, active bool [F].

        greatest_of: the largest of counts, of which other processes may hold a part.
        """
        known = not torch.compiler.is_compiling() and self._version == counts._version
        counts.add_(n_tokens).masked_fill_(active, 0)
        self._version, self._exact, self._greatest = -1, False, None
        if known:
            self._version, self._bound = counts._version, self._bound + n_tokens
            if self._bound >= self._limit and not self._captured:
                self._greatest = LateScalars()
                self._greatest.put(0, greatest_of(counts))

    def reaches(self, counts: Tensor, dead_after: int, greatest_of: Callable[[Tensor], Tensor] = torch.amax) -> bool:
        """Whether a count has reached `dead_after`; True where that is decided on the device (compiled, captured)."""
        if torch.compiler.is_compiling():
            return True
        # from then on replays of the graph may move the counts unseen
        self._captured = self._captured or capturing()
        if self._captured:
            return True
        self._limit = dead_after
        known = self._version == counts._version
        if known and self._greatest is not None:
            ((_, greatest),) = self._greatest.arrived(wait=True)
            self._bound, self._exact, self._greatest = int(greatest), True, None
        elif not known or (self._bound >= dead_after and not self._exact):
            self._version, self._bound, self._exact = counts._version, int(greatest_of(counts)), True
        return self._bound >= dead_after

    def decide_on_device(self) -> None:
        """From now on whether a feature is dead is decided by the loss itself, as in a captured step."""
        self._captured = True

    # of a copy too
    def __reduce__(self) -> tuple[type[IdleTokens], tuple[()]]:
        return IdleTokens, ()

"""Tokens since each feature was last selected, and whether any feature may be dead."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..support.cuda_graphs import capturing


class AuxRule(NamedTuple):
    """The dead-feature loss, step 6 of docs/method.md.

    k_aux: features a token. aux_pool: at most so many dead features take part, those of highest column score; None
    for all. score: which one.
    """

    k_aux: int
    aux_pool: int | None = None
    score: str = "l2"


class IdleTokens:
    """Moves the counts, int64 [F], and bounds their greatest, so that a GPU is rarely asked for it.

    The counts are the caller's, who may also move them in other ways: the bound holds for one version of them.
    """

    def __init__(self) -> None:
        self._bound: tuple[int, int] | None = None
        self._captured = False

    @torch.no_grad()
    def count_(self, counts: Tensor, active: Tensor, n_tokens: int) -> None:
        """`counts += n_tokens`, and 0 for the features that have a kept entry, active bool [F]."""
        bound = self._bound
        if torch.compiler.is_compiling() or (bound is not None and bound[0] != counts._version):
            bound = None
        counts.add_(n_tokens).masked_fill_(active, 0)
        self._bound = None if bound is None else (counts._version, bound[1] + n_tokens)

    def may_reach(
        self,
        counts: Tensor,
        dead_after: int,
        may_wait: bool = True,
        greatest: Callable[[Tensor], Tensor] = torch.amax,
    ) -> bool:
        """False where surely no count has reached `dead_after`.

        may_wait: look at the counts again when the bound has reached it; a device that is ahead would be waited for.
        greatest: of counts that other processes hold parts of.
        """
        if torch.compiler.is_compiling():
            return True
        # from then on replays of the graph may move the counts unseen
        self._captured = self._captured or capturing()
        if self._captured:
            return True
        known = self._bound is not None and self._bound[0] == counts._version
        if not known or (may_wait and self._bound is not None and self._bound[1] >= dead_after):
            self._bound = (counts._version, int(greatest(counts)))
        assert self._bound is not None
        return self._bound[1] >= dead_after

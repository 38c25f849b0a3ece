"""Where a search for the largest entries starts: the threshold at which the last one of the same rule ended."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import batch_budget

MOST_KEPT = 8
# a hint serves a k that is larger or smaller by at most this factor
NEAR = 1.25


class Rule(NamedTuple):
    """How many entries are kept: round(B*k) in a batch for select="batch", int(k) in each token for "token".

    most: so many in a batch, in place of round(B*k).
    """

    k: float
    select: str = "batch"
    most: int | None = None

    def budget(self, n_tokens: int) -> int:
        """Of a batch."""
        return batch_budget(n_tokens, self.k) if self.most is None else self.most


class ThresholdHints:
    """A hint for each rule, kept from one batch to the next. A wrong one costs time, never exactness.

    A search among candidates and one through the whole dictionary are two rules.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[float, str, bool], float | Tensor] = {}

    def of(self, rule: Rule, members: Tensor | None) -> float | Tensor | None:
        """The threshold to start from, also that of a k near by: a number, or fp32 [1] on the device; or None."""
        key = (rule.k, rule.select, members is None)
        if key not in self._known:  # a schedule of k has another one in each step
            near = [k for k, *of in self._known if of == [*key[1:]] and rule.k / NEAR <= k <= rule.k * NEAR]
            key = (min(near, key=lambda k: abs(k - rule.k), default=rule.k), *key[1:])
        return self._known.get(key)

    def keep(self, rule: Rule, members: Tensor | None, hint: float | Tensor | None) -> None:
        """What the search of this batch found. A tensor stays at one address, where a CUDA graph finds it again."""
        key = (rule.k, rule.select, members is None)
        known = self._known.get(key)
        if isinstance(hint, Tensor) and isinstance(known, Tensor):
            known.copy_(hint)
        elif hint is None:
            self._known.pop(key, None)
        else:
            if known is None and len(self._known) == MOST_KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[key] = hint

    def plain(self) -> list[tuple[float, str, bool, float, bool]]:
        """`state_dict` as numbers; the last says whether it was a tensor."""
        return [(*key, float(hint), isinstance(hint, Tensor)) for key, hint in self._known.items()]

    def load_plain(self, state: list[tuple[float, str, bool, float, bool]], device: torch.device | str) -> None:
        """The inverse of `plain`."""
        self._known = {
            (k, select, exact): torch.tensor([hint], device=device) if is_tensor else hint
            for k, select, exact, hint, is_tensor in state
        }

    def state_dict(self) -> list[tuple[float, str, bool, float | Tensor]]:
        """What a checkpoint needs: a search from another threshold may differ in last bits of what it finds."""
        return [(*key, hint) for key, hint in self._known.items()]

    def load_state_dict(self, state: list[tuple[float, str, bool, float | Tensor]], device: torch.device | str) -> None:
        """The inverse of `state_dict`."""
        self._known = {
            (k, select, exact): hint.to(device) if isinstance(hint, Tensor) else float(hint)
            for k, select, exact, hint in state
        }

    def forget(self) -> None:
        """For other weights, or another device."""
        self._known = {}

"""Where a search for the largest entries starts: the threshold at which the last one of the same rule ended."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import batch_budget
from ..support.nth_largest import largest_mask, largest_mask_of_rows

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

    def mask(self, a: Tensor) -> Tensor:
        """Kept entries of a [B, P], bool: strictly positive, within the budget, ties to the lower index."""
        positive = a > 0
        if self.select == "token":
            return largest_mask_of_rows(a, int(self.k)) & positive
        budget = self.budget(a.shape[0])
        if int(positive.count_nonzero()) <= budget:
            return positive
        return largest_mask(a.flatten(), budget).view(a.shape) & positive


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

    def state_dict(self) -> list[tuple[float, str, bool, float, bool]]:
        """What a checkpoint needs, as plain values; the last says whether the hint was a tensor. A search from another
        threshold may differ in last bits of what it finds."""
        return [(*key, float(hint), isinstance(hint, Tensor)) for key, hint in self._known.items()]

    def load_state_dict(self, state: list[tuple[Any, ...]], device: torch.device | str) -> None:
        """The inverse of `state_dict`; earlier versions wrote tensors as such, and no word on them."""
        self._known = {}
        for k, select, exact, hint, *was_tensor in state:
            is_tensor = isinstance(hint, Tensor) or was_tensor == [True]
            value = float(hint)
            known = torch.tensor([value], dtype=torch.float32, device=device) if is_tensor else value
            self._known[k, select, exact] = known

    def forget(self) -> None:
        """For other weights, or another device."""
        self._known = {}

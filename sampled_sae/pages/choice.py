"""Which features of an SAE a page has in full."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

ALLOWED = "must be top, top:N, random, random:N, all, A:B, or numbers as 3,17"
MOST = 1000
# far beyond any SAE, and what the text of an option may hold at most
DIGITS = 12


@dataclass(frozen=True)
class FeatureChoice:
    """A choice of features.

    Attributes:
        kind: "top", "random", "all", "range" or "list".
        numbers: how many for the first two, first and end for a range, the features themselves for a list.
    """

    kind: str
    numbers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> FeatureChoice:
        """From "top", "top:200", "random", "random:50", "all", "0:500" or "3,17".

        Raises:
            ValueError: anything else.
        """
        if found := re.fullmatch(rf"(top|random)(?::(\d{{1,{DIGITS}}}))?", text):
            number = MOST if found[2] is None else int(found[2])
            if number >= 1:
                return cls(found[1], (number,))
        elif text == "all":
            return cls("all")
        elif found := re.fullmatch(rf"(\d{{1,{DIGITS}}}):(\d{{1,{DIGITS}}})", text):
            first, end = int(found[1]), int(found[2])
            if first < end:
                return cls("range", (first, end))
        elif re.fullmatch(rf"\d{{1,{DIGITS}}}(,\d{{1,{DIGITS}}})*", text):
            return cls("list", tuple(dict.fromkeys(map(int, text.split(",")))))
        raise ValueError(f"choice={text if len(text) <= 40 else text[:37] + '...'!r}: {ALLOWED}")

    def of(self, weight: Tensor, seed: int = 0) -> Tensor:
        """The features, int64 [P], ascending.

        Args:
            weight: [F], what "top" goes by; "top" and "random" take features of a weight other than 0 alone.
            seed: of "random".

        Raises:
            ValueError: a feature that is not there.
        """
        n_features = len(weight)
        if self.kind == "all":
            return torch.arange(n_features)
        if self.kind in ("range", "list"):
            last = self.numbers[1] - 1 if self.kind == "range" else max(self.numbers)
            if last >= n_features:
                raise ValueError(f"choice={last}: the SAE has {n_features} features, from 0 to {n_features - 1}")
            return torch.arange(*self.numbers) if self.kind == "range" else torch.tensor(sorted(self.numbers))
        alive = weight.nonzero().squeeze(1)
        if self.kind == "top":
            order = weight[alive].sort(descending=True, stable=True).indices
        else:
            order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))
        return alive[order[: self.numbers[0]]].sort().values

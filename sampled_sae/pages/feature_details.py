"""What a page says of one feature: histogram, contexts, tokens its decoder row raises, neighbours, company."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..inference.products import unit_rows
from .activity import Activity
from .contexts import CorpusText, quantile_tokens, top_tokens
from .html import short

if TYPE_CHECKING:
    from ..lm.logit_lens import LensTokens

BINS = 40
NEIGHBOURS, COMPANY = 6, 8
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


@dataclass(frozen=True)
class Details:
    """Makes the details of features.

    Attributes:
        activity, text: of the corpus; `text` None without text.
        features: int64 [P], which features.
        cosines, neighbours: [P, n], as `nearest` gives them.
        lens: of the same features; None without a model.
        word_of: [ids], the number of the word of each token id.
        contexts: how many top contexts; a quarter as many from each quarter of the activations.
    """

    activity: Activity
    text: CorpusText | None
    features: Tensor
    cosines: Tensor
    neighbours: Tensor
    lens: LensTokens | None
    word_of: Tensor
    contexts: int

    def each(self, advance: Callable[[int], Any] = lambda n: None) -> Iterator[dict[str, Any]]:
        """The details of one feature after the other."""
        for i, feature in enumerate(self.features.tolist()):
            yield self._of(i, feature)
            advance(1)

    def _of(self, i: int, feature: int) -> dict[str, Any]:
        values = self.activity.values[self.activity.ranked(feature)]
        greatest = float(values[0]) if len(values) else 0.0
        top, quarters = self._contexts(feature)
        return {
            "feature": feature,
            "histogram": torch.histc(values, BINS, 0, greatest).int().tolist() if greatest else [],
            "top": top,
            "quarters": quarters,
            "raised": self._tokens(i, "raised"),
            "lowered": self._tokens(i, "lowered"),
            "neighbours": [[j, short(c)] for j, c in zip(self.neighbours[i].tolist(), self.cosines[i].tolist())],
            "company": self._company(feature),
        }

    def _contexts(self, feature: int) -> tuple[list[Any], list[Any]]:
        if self.text is None:
            return [], []
        top = top_tokens(self.activity, self.text, feature, self.contexts)
        quarters = quantile_tokens(self.activity, feature, -(-self.contexts // 4))
        # one call for all of them: each has a cost of its own
        made = iter(self.text.windows(self.activity, feature, torch.cat((top, *quarters)), self.word_of))
        return [next(made) for _ in top], [[next(made) for _ in part] for part in quarters]

    def _tokens(self, i: int, which: str) -> list[list[float]]:
        """[word, logit] of the tokens that the decoder row raises, or lowers."""
        if self.lens is None:
            return []
        words = self.word_of[getattr(self.lens, f"{which}_ids")[i]].tolist()
        return [[word, short(logit)] for word, logit in zip(words, getattr(self.lens, which)[i].tolist())]

    def _company(self, feature: int) -> list[list[float]]:
        """[feature, overlap, share] of those that fire with it most.

        overlap: tokens of both over tokens of either. share: of this feature's tokens, those of both.
        """
        own, both = int(self.activity.counts[feature]), self.activity.together(feature)
        overlap = both.double() / (own + self.activity.counts - both).clamp(min=1)
        best = overlap.topk(min(COMPANY, len(overlap)))
        found = [(j, o) for o, j in zip(best.values.tolist(), best.indices.tolist()) if o > 0]
        return [[j, short(o), short(int(both[j]) / own)] for j, o in found]

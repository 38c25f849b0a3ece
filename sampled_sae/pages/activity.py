"""`Activity`: the codes of a corpus in memory, by token and by feature."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..inference.codes_store import CodesStore


@dataclass(frozen=True)
class Activity:
    """The active entries of N tokens, sorted by token, then feature.

    Attributes:
        values: float32 [n], the activations.
        keys: int64 [n], token * d_sae + feature, ascending.
        n_tokens, d_sae: N and F.
    """

    values: Tensor
    keys: Tensor
    n_tokens: int
    d_sae: int

    @classmethod
    def read(cls, store: CodesStore, n_shards: int) -> Activity:
        """The first shards of a store."""
        values, keys, first = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)], 0
        for i in range(n_shards):
            entries = store.codes(i).entries()
            values.append(entries.values.float())
            keys.append((entries.tokens + first) * store.d_sae + entries.features)
            first += store.tokens[i]
        return cls(torch.cat(values), torch.cat(keys), first, store.d_sae)

    @cached_property
    def tokens(self) -> Tensor:
        """int64 [n]."""
        return self.keys // self.d_sae

    @cached_property
    def features(self) -> Tensor:
        """int64 [n]."""
        return self.keys % self.d_sae

    @cached_property
    def counts(self) -> Tensor:
        """int64 [F]: on how many tokens each feature is active."""
        return torch.bincount(self.features, minlength=self.d_sae)

    @cached_property
    def sums(self) -> Tensor:
        """float64 [F]: the sum of each feature's activations."""
        return torch.bincount(self.features, self.values.double(), minlength=self.d_sae)

    @cached_property
    def maxima(self) -> Tensor:
        """float32 [F]: the greatest activation of each feature, 0 where it is never active."""
        return torch.zeros(self.d_sae).scatter_reduce_(0, self.features, self.values, "amax")

    @property
    def l0(self) -> float:
        return len(self.values) / max(1, self.n_tokens)

    def ranked(self, feature: int) -> Tensor:
        """int64: the entries of a feature, greatest activation first, ties to the earlier token."""
        end = int(self._ends[feature])
        return self._by_feature[end - int(self.counts[feature]) : end]

    def strongest(self, n: int) -> Tensor:
        """int64 [F, n]: the first n entries of `ranked` of every feature, -1 where it has fewer."""
        place = torch.arange(n)
        start = self._ends - self.counts
        at = (start[:, None] + place).clamp(max=max(0, len(self.values) - 1))
        found = self._by_feature[at] if len(self.values) else at
        return torch.where(place < self.counts[:, None], found, -1)

    def at(self, tokens: Tensor, feature: int) -> Tensor:
        """The activations of one feature on tokens of any shape, 0 where it is not active."""
        wanted = tokens * self.d_sae + feature
        place = torch.searchsorted(self.keys, wanted).clamp(max=max(0, len(self.keys) - 1))
        return torch.where(self.keys[place] == wanted, self.values[place], 0)

    def together(self, feature: int) -> Tensor:
        """int64 [F]: on how many tokens of this feature each of the others is active; 0 for itself."""
        tokens = self.tokens[self.ranked(feature)]
        ends = self._token_ends
        start, length = ends[tokens], ends[tokens + 1] - ends[tokens]
        skipped = start - (length.cumsum(0) - length)
        entries = skipped.repeat_interleave(length) + torch.arange(int(length.sum()))
        counts = torch.bincount(self.features[entries], minlength=self.d_sae)
        counts[feature] = 0
        return counts

    @cached_property
    def _by_feature(self) -> Tensor:
        """Entries by feature, then by activation, then by token."""
        order = self.values.sort(descending=True, stable=True).indices
        return order[self.features[order].sort(stable=True).indices]

    @cached_property
    def _ends(self) -> Tensor:
        return self.counts.cumsum(0)

    @cached_property
    def _token_ends(self) -> Tensor:
        counts = torch.bincount(self.tokens, minlength=self.n_tokens)
        return torch.cat((counts.new_zeros(1), counts.cumsum(0)))

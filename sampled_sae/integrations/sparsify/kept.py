"""Tables [N, k] of kept activations that remember the entries behind them.

sparsify hands the decoder two tables. Those that come from our encoder, unchanged, bring along the order of their
entries by feature, which encoder and decoder need for their gradients, and leave out what was filled up with zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...codes import SparseCodes

NAME = "_sampled_sae_entries"


class Entries(NamedTuple):
    """Where the values of a table lie, all others being 0.

    codes: with values of their own, which are not used. place: int64, of a list, the position in the flat table of
    each entry, None where all stand in order; of a block, the position in the flat block of each of the table's.
    """

    codes: SparseCodes
    place: Tensor | None

    def with_values(self, flat: Tensor) -> SparseCodes:
        """The codes with the values of the flat table [N * k]."""
        codes = self.codes
        if codes.block is not None:
            assert codes.pool is not None
            assert self.place is not None
            block = flat.new_zeros(codes.block.shape).flatten().index_copy(0, self.place, flat).view(codes.block.shape)
            return SparseCodes.from_block(block, codes.pool, codes.shape[1])
        values = flat if self.place is None else flat.index_select(0, self.place)
        listed = SparseCodes(values, codes.tokens, codes.features, codes.shape)
        listed.index = codes.index
        return listed


class Mark(NamedTuple):
    """What hangs on a table of activations: its entries, and the tables as they were."""

    entries: Entries
    indices: Tensor
    versions: tuple[int, int]


def mark(top_acts: Tensor, top_indices: Tensor, entries: Entries) -> None:
    """Makes `kept_codes` find the entries of this table, unless nobody could tell whether it was written to."""
    if top_acts.is_inference() or top_indices.is_inference():
        return
    setattr(top_acts, NAME, Mark(entries, top_indices, (version(top_acts), version(top_indices))))


def kept_codes(top_acts: Tensor, top_indices: Tensor, n_features: int, dtype: torch.dtype) -> SparseCodes | None:
    """The codes of a pair of tables that `mark` saw and nobody changed; None for any other."""
    found: Mark | None = getattr(top_acts, NAME, None)
    if found is None or found.indices is not top_indices or found.entries.codes.shape[1] != n_features:
        return None
    if found.versions != (version(top_acts), version(top_indices)):
        return None
    return found.entries.with_values(top_acts.reshape(-1).to(dtype))


def version(t: Tensor) -> int:
    """How often a tensor was written to, where torch keeps count."""
    return 0 if t.is_inference() else t._version


def table(codes: SparseCodes, k: int, candidates: Tensor | None) -> tuple[Tensor, Tensor, Entries]:
    """(activations [N, k], features int64 [N, k], entries) of codes with at most k entries a token.

    Args:
        candidates: int64 [>= k], distinct, what a token with fewer entries is filled up with, under activations of 0;
            None for features that the batch uses, and others after them.
    """
    n_tokens, n_features = codes.shape
    if codes.block is not None:
        assert codes.pool is not None
        acts, at = codes.block.topk(k, dim=1, sorted=False)
        start = torch.arange(n_tokens, device=at.device)[:, None] * codes.block.shape[1]
        return acts, codes.pool[at], Entries(codes, (start + at).flatten())
    if codes.slots is not None:
        values, tokens, features = codes.slots.values, codes.slots.tokens.long(), codes.slots.features.long()
    else:
        values, tokens, features = codes.entries()
        if len(values) == n_tokens * k:
            return values.view(n_tokens, k), features.view(n_tokens, k), Entries(codes, None)
    if candidates is None:
        candidates = torch.sort(codes.active_mask().byte(), descending=True, stable=True).indices
    candidates = candidates[:k]
    ends = torch.searchsorted(tokens, torch.arange(n_tokens + 1, device=tokens.device))
    rank = torch.arange(len(tokens), device=tokens.device) - ends[tokens]
    place = torch.where(tokens < n_tokens, tokens * k + rank, n_tokens * k)
    flat = fillers(tokens, features, ends.diff(), candidates, n_features).index_copy_(0, place, features)
    acts = values.new_zeros(n_tokens * k + 1).index_copy(0, place, values)
    return acts[:-1].view(n_tokens, k), flat[:-1].view(n_tokens, k), Entries(codes, place)


def fillers(tokens: Tensor, features: Tensor, counts: Tensor, candidates: Tensor, n_features: int) -> Tensor:
    """int64 [N * k + 1]: from column counts_i of row i on, the first candidates [k] that are no features of token i."""
    n_tokens, k = len(counts), len(candidates)
    rank = candidates.new_full((n_features + 1,), k)
    rank[candidates] = torch.arange(k, device=candidates.device)
    taken = torch.zeros(n_tokens + 1, k + 1, dtype=torch.bool, device=candidates.device)
    taken.view(-1).index_fill_(0, tokens * (k + 1) + rank[features], True)
    free = ~taken[:-1, :-1]  # [N, k]
    column = free.cumsum(1) + (counts[:, None] - 1)
    row = torch.arange(n_tokens, device=candidates.device)[:, None]
    place = torch.where(free & (column < k), row * k + column, n_tokens * k)
    flat = candidates.new_empty(n_tokens * k + 1)
    return flat.index_copy_(0, place.flatten(), candidates.repeat(n_tokens))

"""A search through chunks of the encoder product, and the filter that it puts them through.

Where the operands have a screen, a chunk is a bfloat16 product: what its bound does not rule out is a candidate. With
x^ and w^ the operands in bfloat16, z_ij = x_i . w_j + b_j is at most

    x^_i . w^_j + ||x^_i|| e_j + ||dx_i|| ||w_j|| + b_j,   e_j = ||dw_j|| + the rounding of sums,

as in screen.py. That is one product, in which what does not fit into bfloat16 is rounded up. A floor for each token is
compared with it afterwards: rounding never swaps two numbers. Both are compared as whole numbers, for the bits of
floats above zero sort as their values do, and those below are negative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...codes import Entries
from ..encoder import Operands
from ..rounded_tokens import LARGEST
from .products import BLOCK_FEATURES, activations_at, features_of, padded_chunk, products_by_feature
from .screen import FeatureRounding, rounding_slack, scaled_bias

# a screen that lets more than this share of a chunk through costs more than it saves
MOST_SCREENED = 1 / 16
# of the candidates, how many may be kept: a screen lets about four times as many through
MOST_KEPT = MOST_SCREENED / 4
# of the budget, how many are computed before it is known what the others have to surpass
FIRST = 1.125


class Search(ABC):
    """Entries > 0 and at or above a floor, which may rise from chunk to chunk.

    With a screen every entry found is computed again, one by one, before it is compared with others: neither its value
    nor whether it is found depends on which chunks were screened. Until then an upper bound stands for it. Those of the
    highest bounds are computed first, and then those alone that by their bound may still be kept beside them.
    """

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.screening = operands.screen is not None and operands.screen.in_range
        self.looked = False  # whether looks leave entries open, which are counted when they are computed
        self.found: list[Entries] = []  # with a screen, upper bounds
        self.settled: list[Entries] = []
        self.count = 0

    def look_at(self, token: int, block: Operands, span: slice, floor: Tensor) -> None:
        """Through some candidates of a block of tokens that begins at `token`; floor [1] or [B], of the block."""
        found = self._screened(token, block, span, floor)
        if found is None:
            found = self._in_full(token, block, span, floor)
        self.found.append(found)
        self.count += len(found.values)

    def _screened(self, token: int, block: Operands, span: slice, floor: Tensor) -> Entries | None:
        """What a look through the screen leaves; None where there is none, or it leaves too much."""
        if block.screen is None or not self.screening or not floor.any():
            return None
        bits, n_seen = seen_bits(block, span), block.n_tokens * (span.stop - span.start)
        if bits is not None:
            upper, tokens, features = filter_chunk(bits, token, span.start, bits_of(floor))
            if len(upper) <= MOST_SCREENED * n_seen:
                block.screen.looks.see_entries(n_seen, 0)
                self.looked = True
                # the product was rounded to the nearest: what it bounds is below the next number
                return Entries((upper + 1).view(torch.bfloat16).float(), tokens, features)
        block.screen.looks.see_entries(n_seen, n_seen)
        self.screening = self.looked = False  # all of the chunk is counted
        return None

    def _in_full(self, token: int, block: Operands, span: slice, floor: Tensor) -> Entries:
        """The same from a product in full precision; with a screen, below what it and one entry alone may differ by."""
        least = floor.clamp_min(smallest_positive(floor.dtype))
        if block.screen is None:
            return filter_chunk(activations_at(block, span), token, span.start, least)
        slack = rounding_slack(block, features_of(block, span))
        if floor.any():
            least = torch.where(slack.isfinite(), floor - slack, floor).clamp_min(smallest_positive(floor.dtype))
        values, tokens, features = filter_chunk(activations_at(block, span), token, span.start, least)
        return Entries(values + slack.index_select(0, tokens - token), tokens, features)

    def settle(self, floor: Tensor) -> Entries:
        """All that was found and may be kept, in full precision; floor [1] or [B], of the whole batch."""
        if self.operands.screen is None:
            self.settled += self.found
        elif self.found:
            seen = self._arranged()
            exact, first = torch.zeros_like(seen.values), seen.values >= self._least(seen, seen, FIRST)
            some = self._compute(exact, seen, first, floor)
            self._compute(exact, seen, ~first & (seen.values >= self._least(some, seen, 1.0)), floor)
            self.settled.append(seen._replace(values=exact).at((exact > 0).nonzero().squeeze(1)))
        return self.keep(Entries.joined(self.settled))

    def keep(self, entries: Entries) -> Entries:
        """These alone of what was found so far."""
        self.found, self.settled, self.count = [], [entries], len(entries.values)
        return entries

    @abstractmethod
    def _arranged(self) -> Entries:
        """What was found, in the order that `_least` asks for."""

    @abstractmethod
    def _least(self, entries: Entries, at: Entries, share: float) -> Tensor:
        """For each of `at`, [n] or [1], what the last of the budget times `share` has; 0 where there are fewer."""

    def _compute(self, exact: Tensor, seen: Entries, which: Tensor, floor: Tensor) -> Entries:
        """The activations of `which`, bool, of `seen` are written to `exact`, 0 for those below the floor, [1] or [B];
        the others are returned."""
        at = which.nonzero().squeeze(1)
        entries = seen.at(at)
        if self.looked:
            assert self.operands.screen is not None
            self.operands.screen.looks.see_entries(0, len(at))
        values = self._activations(entries)
        least = floor if len(floor) == 1 else floor.index_select(0, entries.tokens)
        above = values >= least.clamp_min(smallest_positive(values.dtype))
        exact.index_copy_(0, at, torch.where(above, values, 0))
        return entries._replace(values=values).at(above.nonzero().squeeze(1))

    def _activations(self, entries: Entries) -> Tensor:
        """Before the relu, at entries in any order."""
        x, W, b, scale, members, *_ = self.operands
        order = torch.argsort(entries.features.int(), stable=True)  # half the time of int64
        tokens, features = (t.index_select(0, order) for t in entries[1:])
        if members is not None:
            features = members.index_select(0, features)
        z = products_by_feature(x.contiguous(), W, tokens, features)
        z += b.index_select(0, features)
        if scale is not None:
            z *= scale.index_select(0, features)
        return torch.empty_like(z).index_copy_(0, order, z)


def seen_bits(operands: Operands, span: slice) -> Tensor | None:
    """What some activations are at most: bits of bfloat16, int16 [B, C], in a `padded_chunk`; None out of range."""
    assert operands.screen is not None
    at = features_of(operands, span)
    # a search computes few of what it finds again, and measures nothing for it
    features, bias = FeatureRounding.of(operands, at), scaled_bias(operands, at)
    sizes = bias.abs()
    if not float(torch.maximum(features.norms, sizes).amax()) < LARGEST:  # or NaN
        return None
    W = features.bounding(bias, sizes, 1)
    z, inner = padded_chunk(W, operands.n_tokens, span)
    torch.mm(operands.screen.columns, W.t(), out=inner)
    return z.view(torch.int16)


def bits_of(floor: Tensor) -> Tensor:
    """int16, those of floors >= 0 rounded down to bfloat16."""
    return (floor.contiguous().view(torch.int32) >> 16).to(torch.int16)


def filter_chunk(a: Tensor, token: int, base: int, floor: Tensor) -> Entries:
    """Entries >= floor ([1] or [B], of a's dtype) of a chunk [B, C], sorted by token, then column.

    The chunk's first row is that of token `token`, its first column number `base`.
    """
    n_blocks = a.shape[1] // BLOCK_FEATURES
    top = a.view(-1, BLOCK_FEATURES).amax(1).view(-1, n_blocks)  # [B, C / 32]
    hits = (top >= floor[:, None]).flatten().nonzero().squeeze(1)
    inside = a.view(-1, BLOCK_FEATURES).index_select(0, hits)  # [H, 32]
    least = floor.index_select(0, hits // n_blocks) if len(floor) > 1 else floor
    at = (inside >= least[:, None]).flatten().nonzero().squeeze(1)
    place = hits.index_select(0, at // BLOCK_FEATURES) * BLOCK_FEATURES + at % BLOCK_FEATURES  # in the flat chunk
    return Entries(inside.flatten().index_select(0, at), place // a.shape[1] + token, place % a.shape[1] + base)


def smallest_positive(dtype: torch.dtype) -> float:
    return float(torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)))


def merged(parts: list[Entries], n_tokens: int) -> Entries:
    """Entries of some features after others, each sorted by token, as one list sorted by token, then feature."""
    if len(parts) == 1:
        return parts[0]
    counts = torch.stack([torch.bincount(part.tokens, minlength=n_tokens) for part in parts], 1)  # [B, parts]
    # what stands in the list before the entries of a token from a part, and in the part before them
    before, own = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape), counts.cumsum(0) - counts
    places = []
    for part, shift in zip(parts, (before - own).t().contiguous()):
        places.append(shift.index_select(0, part.tokens).add_(torch.arange(len(part.tokens), device=shift.device)))
    at = torch.cat(places)
    return Entries(*(torch.empty_like(column).index_copy_(0, at, column) for column in Entries.joined(parts)))


def in_order(entries: Entries) -> Entries:
    """By token, then column."""
    tokens, features = entries.tokens, entries.features
    n_columns = int(features.max()) + 1 if len(features) else 1
    keys = tokens * n_columns + features
    if bool((keys[1:] > keys[:-1]).all()):
        return entries
    return entries.at(torch.argsort(keys))

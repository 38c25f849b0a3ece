"""Every activation above the floor of its feature, without [B, F]: chunks of the encoder product through a filter.

A chunk [B, C] is filtered in cache, as in stream.py. With a screen it is a bfloat16 product (floor_screen.py), and what
that cannot rule out is computed again, one by one, while the chunk's weights are in cache. Where a rule lets so much
through that lists of entries cost more than the product, whole rows of activations are computed for a few tokens at a
time: the same memory, whatever the share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...codes import Entries
from ...support.reused_memory import scratch
from ..encoder import Operands
from .products import (
    activations_at,
    candidate_spans,
    ends_of_tokens,
    raised,
    sampled_product,
    token_blocks,
)
from .screen_entries import seen_from_above
from .search import MOST_SCREENED, filter_chunk, in_order, join, smallest_positive, take

# a rule that lets more than this share of a batch through gets whole rows
MOST_LISTED = 1 / 64
# entries found before that share is looked at
FEWEST_LISTED = 1 << 16
# activations in whole rows at once, and tokens at least: fewer would make a slow product
ROW_ELEMENTS = 1 << 22
FEWEST_TOKENS = 32


def entries_above(operands: Operands, floor: Tensor) -> Entries:
    """Every entry of (x W^T + b) * scale strictly above the floor, [1] or [F], sorted by token, then feature."""
    if operands.n_tokens == 0:  # of a process whose part of a batch is empty
        nothing = operands.x.new_zeros(0)
        return Entries(nothing, nothing.long(), nothing.long())
    search, found = FloorSearch(floor), []
    for token, block in token_blocks(operands):
        values, tokens, features = search.among(block)
        found.append(Entries(values, tokens + token, features))
    return join(found)


class FloorSearch:
    """One batch's search; what it learns from a block of tokens, it does not try again with the next.

    Attributes:
        screening: whether it looks through the screen. listing: whether it lists the entries of chunks, and does not
            compute whole rows.
    """

    def __init__(self, floor: Tensor) -> None:
        # an activation that left the range of float32 is above no infinite floor: values are compared in the end
        self.floor, self.finite_floor = floor, floor.clamp(max=torch.finfo(floor.dtype).max)
        self.screening = self.listing = True

    def among(self, block: Operands) -> Entries:
        """The entries of a block of tokens."""
        found = self.listed(block) if self.listing else None
        return found if found is not None else in_whole_rows(block, self.floor)

    def listed(self, block: Operands) -> Entries | None:
        """The same chunk by chunk; None where there are too many."""
        found, count = [], 0
        self.screening &= block.screen is not None and block.screen.in_range
        for span in candidate_spans(block):
            part = self._screened(block, span)
            if part is None:
                part = self._in_full(block, span)
            found.append(part)
            count += len(part.values)
            if count > max(FEWEST_LISTED, MOST_LISTED * block.n_tokens * span.stop):
                self.listing = False
                return None
        return in_order(join(found), block.n_features)

    def _screened(self, block: Operands, span: slice) -> Entries | None:
        """Entries of a chunk seen through the screen; None where it leaves too much open, and rests from then on."""
        if block.screen is None or not self.screening:
            return None
        seen, n_seen = (
            seen_from_above(block, span, self._of(self.finite_floor, span)),
            block.n_tokens * (span.stop - span.start),
        )
        if seen is not None:
            candidates = filter_chunk(seen, 0, 0, seen.new_zeros(1))
            if len(candidates.values) <= MOST_SCREENED * n_seen:
                block.screen.looks.see_entries(n_seen, len(candidates.values))
                return self._settled(block, span, candidates)
        block.screen.looks.see_entries(n_seen, n_seen)
        self.screening = False
        return None

    def _settled(self, block: Operands, span: slice, candidates: Entries) -> Entries:
        """The candidates of a chunk, columns counted from its first, in full precision."""
        _, tokens, columns = candidates
        x, W, b, scale, *_ = block
        ends = ends_of_tokens(tokens, block.n_tokens)
        values = sampled_product(x, raised(W[span], x), ends, columns)
        values += b[span].index_select(0, columns)
        if scale is not None:
            values *= scale[span].index_select(0, columns)
        return self._above(Entries(values, tokens, columns + span.start))

    def _in_full(self, block: Operands, span: slice) -> Entries:
        """Entries of a chunk from a product in full precision."""
        a = activations_at(block, span)
        floor = self._of(self.finite_floor, span)
        if len(floor) == 1:
            least = torch.nextafter(floor, torch.full_like(floor, torch.inf))
            return self._above(filter_chunk(a, 0, span.start, least))
        gap = scratch(a, *a.shape)
        width = span.stop - span.start
        torch.sub(a[:, :width], floor, out=gap[:, :width])
        gap[:, width:] = -torch.inf
        _, tokens, features = filter_chunk(gap, 0, span.start, gap.new_full((1,), smallest_positive(gap.dtype)))
        values = a.flatten().index_select(0, tokens * a.shape[1] + (features - span.start))
        return self._above(Entries(values, tokens, features))

    def _above(self, entries: Entries) -> Entries:
        floor = self.floor if len(self.floor) == 1 else self.floor.index_select(0, entries.features)
        return take(entries, (entries.values > floor).nonzero().squeeze(1))

    @staticmethod
    def _of(floor: Tensor, span: slice) -> Tensor:
        return floor if len(floor) == 1 else floor[span]


def in_whole_rows(block: Operands, floor: Tensor) -> Entries:
    """Entries of dense rows of activations, a few tokens at a time."""
    found = []
    for at, part in row_blocks(block):
        a = scratch(block.x, part.n_tokens, block.n_features)
        dense_activations(part, a)
        tokens, features = (a > floor).nonzero(as_tuple=True)
        found.append(Entries(a[tokens, features], tokens + at.start, features))
    return join(found)


def row_blocks(operands: Operands) -> Iterator[tuple[slice, Operands]]:
    """(some tokens, their operands): few enough for whole rows of activations."""
    step = max(FEWEST_TOKENS, ROW_ELEMENTS // operands.n_features)
    for start in range(0, operands.n_tokens, step):
        at = slice(start, min(start + step, operands.n_tokens))
        yield at, operands.of_tokens(at)


def dense_activations(operands: Operands, out: Tensor) -> None:
    """(x W^T + b) * scale into `out` [B, F], before the relu."""
    x, W, b, scale, *_ = operands
    if W.dtype == x.dtype:
        torch.addmm(b, x, W.t(), out=out)
        if scale is not None:
            out.mul_(scale)
        return
    for span in candidate_spans(operands):
        out[:, span] = activations_at(operands, span)[:, : span.stop - span.start]

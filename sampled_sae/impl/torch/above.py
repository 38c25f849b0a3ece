"""Every activation above the floor of its feature, without [B, F]: chunks of the encoder product through a filter.

A chunk [B, C] is filtered in cache (column_filter.py). With a screen it is a bfloat16 product (plain_screen.py where
both operands hold no more, screen_entries.py for all others), and what that cannot rule out is computed again, one by
one. Where a rule lets so much through that lists of entries cost more than the product, whole rows of activations are
computed for a few tokens at a time: the same memory, whatever the share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...codes import Entries
from ...support.even_slices import even_slices
from ...support.reused_memory import scratch
from ..encoder import Operands
from .column_filter import places_reaching
from .plain_screen import PlainScreen, is_plain
from .products import (
    GATHERED_ELEMENTS,
    activations_at,
    candidate_spans,
    ends_of_tokens,
    raised,
    sampled_product,
)
from .screen_entries import seen_above
from .search import MOST_SCREENED, in_order, join, take

# elements of tokens, of weights and of their product, at once
TOKEN_ELEMENTS = 1 << 22
WEIGHT_ELEMENTS = 1 << 22
CHUNK_ELEMENTS = 1 << 20
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
        return nothing_of(operands)
    search, found = FloorSearch(floor), []
    for at, block in blocks_of_tokens(operands):
        values, tokens, features = search.among(block)
        found.append(Entries(values, tokens + at.start, features))
    return join(found)


def blocks_of_tokens(operands: Operands) -> Iterator[tuple[slice, Operands]]:
    """(some tokens, their operands), in blocks of about the same size."""
    for at in even_slices(operands.n_tokens, operands.x.shape[1], TOKEN_ELEMENTS):
        yield at, operands.of_tokens(at)


def nothing_of(operands: Operands) -> Entries:
    nothing = operands.x.new_zeros(0)
    return Entries(nothing, nothing.long(), nothing.long())


class Found:
    """What was found so far, chunk by chunk: columns of numbers."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, ...]] = []
        self.count = 0

    def add(self, *columns: Tensor) -> None:
        self.parts.append(columns)
        self.count += len(columns[0])

    def taken(self) -> list[Tensor]:
        """All of it, which is no longer held here."""
        columns = [torch.cat(column) for column in zip(*self.parts)]
        self.parts, self.count = [], 0
        return columns


class FloorSearch:
    """One batch's search; what it learns from a block of tokens, it does not try again with the next.

    Attributes:
        screens: those that it may still look through, in the order in which they are tried. listing: whether it lists
            the entries of chunks, and does not compute whole rows.
    """

    def __init__(self, floor: Tensor) -> None:
        # an activation that left the range of float32 is above no infinite floor: values are compared in the end
        self.floor, self.finite_floor = floor, floor.clamp(max=torch.finfo(floor.dtype).max)
        self.least = torch.nextafter(self.finite_floor, torch.full_like(floor, torch.inf))
        self.screens = ["plain", "bounded"]
        self.listing = True

    def among(self, block: Operands) -> Entries:
        """The entries of a block of tokens."""
        found = self.listed(block) if self.listing else None
        return found if found is not None else in_whole_rows(block, self.floor)

    def listed(self, block: Operands) -> Entries | None:
        """The same chunk by chunk; None where there are too many."""
        look, start = LookThrough(block, self.screens), 0
        found, candidates = Found(), Found()
        found.add(*nothing_of(block))
        while start < block.n_features:
            span = slice(start, min(start + look.width(), block.n_features))
            seen = self._screened(look, span)
            if seen is None:
                found.add(*self._in_full(block, span))
            else:
                candidates.add(*seen)
            start = span.stop
            if candidates.count * block.W.shape[1] >= GATHERED_ELEMENTS:
                found.add(*self._settled(block, *candidates.taken()))
            if found.count + candidates.count > max(FEWEST_LISTED, MOST_LISTED * block.n_tokens * start):
                self.listing = False
                return None
        if candidates.count:
            found.add(*self._settled(block, *candidates.taken()))
        return in_order(Entries(*found.taken()), block.n_features)

    def _screened(self, look: LookThrough, span: slice) -> tuple[Tensor, Tensor] | None:
        """(tokens, features) that a screen leaves open; None where there is no screen that leaves few enough."""
        while look.screen is not None:
            seen = look.through(span, self._of(self.finite_floor, span))
            if seen is not None:
                places, width = seen
                look.count(look.block.n_tokens * width, len(places))
                if len(places) <= MOST_SCREENED * look.block.n_tokens * width:
                    tokens = places // width
                    return tokens, places - tokens * width + span.start
            look.drop()
        return None

    def _settled(self, block: Operands, tokens: Tensor, features: Tensor) -> Entries:
        """Candidates in full precision."""
        x, W, b, scale, *_ = block
        tokens, order = tokens.sort(stable=True)
        features = features.index_select(0, order)
        at = features
        if W.dtype != x.dtype:
            # only those that have candidates are raised, each once
            distinct, at = features.unique(return_inverse=True)
            W = raised(W.index_select(0, distinct), x)
        values = sampled_product(x, W, ends_of_tokens(tokens, block.n_tokens), at)
        values += b.index_select(0, features)
        if scale is not None:
            values *= scale.index_select(0, features)
        return self._above(Entries(values, tokens, features))

    def _in_full(self, block: Operands, span: slice) -> Entries:
        """Entries of a chunk from a product in full precision."""
        a = activations_at(block, span)
        places = places_reaching(a, self._of(self.least, span))
        values = a.flatten().index_select(0, places)
        return self._above(Entries(values, places // a.shape[1], places % a.shape[1] + span.start))

    def _above(self, entries: Entries) -> Entries:
        floor = self.floor if len(self.floor) == 1 else self.floor.index_select(0, entries.features)
        return take(entries, (entries.values > floor).nonzero().squeeze(1))

    @staticmethod
    def _of(floor: Tensor, span: slice) -> Tensor:
        return floor if len(floor) == 1 else floor[span]


class LookThrough:
    """How a block of tokens is looked at: the first screen of the search's that suits it, until that is dropped."""

    def __init__(self, block: Operands, screens: list[str]) -> None:
        self.block, self.screens = block, screens
        usable = block.screen is not None and block.screen.in_range
        self.plain: PlainScreen | None = None
        self._left = [name for name in screens if usable and (name != "plain" or is_plain(block))]

    @property
    def screen(self) -> str | None:
        return self._left[0] if self._left else None

    def drop(self) -> None:
        """The screen in use, for this block and those that come."""
        self.screens.remove(self._left.pop(0))

    def count(self, seen: int, left: int) -> None:
        """Of the entries of a chunk, how many a look has left open."""
        assert self.block.screen is not None
        self.block.screen.looks.see_entries(seen, left)

    def width(self) -> int:
        """Features a chunk, which is small enough for the cache."""
        W, n_tokens = self.block.W, self.block.n_tokens
        bytes_each = 2 if self.screen is not None else self.block.x.element_size()
        weights = W.shape[1] * (1 if W.dtype == self.block.x.dtype or self.screen is not None else 2)
        return max(64, min(2 * CHUNK_ELEMENTS // (n_tokens * bytes_each), WEIGHT_ELEMENTS // weights) // 64 * 64)

    def through(self, span: slice, floor: Tensor) -> tuple[Tensor, int] | None:
        """Where a chunk [B, C], flat, may lie above its floor, [1] or [C], ascending; and C. None out of range."""
        if self.screen == "plain":
            self.plain = self.plain or PlainScreen(self.block)
            return self.plain.places(span, floor)
        seen = seen_above(self.block, span, floor)
        return None if seen is None else (places_reaching(seen, seen.new_zeros(1)), seen.shape[1])


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

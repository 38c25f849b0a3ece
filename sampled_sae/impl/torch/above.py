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
from .look_through import LookThrough
from .products import activations_at, candidate_spans, ends_of_tokens, sampled_product
from .search import MOST_SCREENED, join

# elements of tokens that are looked at together: for fewer the weights would be read, and rounded, more often
TOKEN_ELEMENTS = 1 << 22
# candidates that are computed in full precision together
MOST_WAITING = 1 << 12
# a rule that lets more than this share of a batch through gets whole rows
MOST_LISTED = 1 / 64
# entries found before that share is looked at
FEWEST_LISTED = 1 << 16
# activations in whole rows at once, elements of their tokens, and tokens at least: fewer would make a slow product
ROW_ELEMENTS = 1 << 22
ROW_TOKEN_ELEMENTS = 1 << 19
FEWEST_TOKENS = 32


def entries_above(operands: Operands, floor: Tensor) -> Entries:
    """Every entry of (x W^T + b) * scale strictly above the floor, [1] or [F], sorted by token, then feature."""
    search, found = FloorSearch(floor), []
    for at, block in blocks_of_tokens(operands):
        entries = search.among(block)
        entries.tokens.add_(at.start)
        found.append(entries)
    # no token: of a process whose part of a batch is empty
    return join(found) if found else Found(operands).entries()


def blocks_of_tokens(operands: Operands) -> Iterator[tuple[slice, Operands]]:
    """(some tokens, their operands), in blocks of about the same size."""
    for at in even_slices(operands.n_tokens, operands.x.shape[1], TOKEN_ELEMENTS):
        yield at, operands.of_tokens(at)


class Found:
    """Entries of a block [T, F] that were found so far: their values, and their places in it, flat."""

    def __init__(self, block: Operands) -> None:
        self.n_features = block.n_features
        self.values: list[Tensor] = [block.b.new_zeros(0)]
        self.places: list[Tensor] = [block.b.new_zeros(0, dtype=torch.int64)]
        self.count = 0

    def add(self, values: Tensor, places: Tensor) -> None:
        self.values.append(values)
        self.places.append(places)
        self.count += len(values)

    def entries(self) -> Entries:
        """All of them by token, then feature; they are no longer held here."""
        places, self.places = torch.cat(self.places), []
        values, self.values = torch.cat(self.values), []
        if not bool((places[1:] > places[:-1]).all()):
            places, order = places.sort()
            values = values.index_select(0, order)
        tokens = places // self.n_features
        return Entries(values, tokens, places.sub_(tokens * self.n_features))


class FloorSearch:
    """One batch's search; what it learns from a block of tokens, it does not try again with the next.

    Attributes:
        screens: those that it may still look through, in the order in which they are tried. listing: whether it lists
            the entries of chunks, and does not compute whole rows.
    """

    def __init__(self, floor: Tensor) -> None:
        self.floor = floor
        self.screens = ["plain", "bounded"]
        self.listing = True

    def among(self, block: Operands) -> Entries:
        """The entries of a block of tokens."""
        found = self.listed(block) if self.listing else None
        return found if found is not None else in_whole_rows(block, self.floor)

    def listed(self, block: Operands) -> Entries | None:
        """The same chunk by chunk; None where there are too many."""
        look, found, start = LookThrough(block, self.screens), Found(block), 0
        waiting: list[Tensor] = []
        n_waiting = 0
        while start < block.n_features:
            span = slice(start, min(start + look.width(), block.n_features))
            seen = self._screened(look, span)
            if seen is None:
                found.add(*self._in_full(look.full, span))
            else:
                waiting.append(seen)
                n_waiting += len(seen)
            start = span.stop
            if n_waiting >= MOST_WAITING:
                found.add(*self._settled(block, torch.cat(waiting)))
                waiting, n_waiting = [], 0
            if found.count + n_waiting > max(FEWEST_LISTED, MOST_LISTED * block.n_tokens * start):
                self.listing = False
                return None
        look.let_go()
        if waiting:
            found.add(*self._settled(block, torch.cat(waiting)))
        return found.entries()

    def _screened(self, look: LookThrough, span: slice) -> Tensor | None:
        """Places that a screen leaves open; None where there is no screen that leaves few enough."""
        width = span.stop - span.start
        n_seen = look.block.n_tokens * width
        while look.screen is not None:
            seen = look.through(span, self._finite(span))
            if seen is not None:
                look.count(n_seen, len(seen))
                if len(seen) <= MOST_SCREENED * n_seen:
                    return in_block(seen, span, width, look.block.n_features)
            look.drop()
        return None

    def _settled(self, block: Operands, places: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates in full precision: (values, places) of those above their floor."""
        places = places.sort().values
        tokens = places // block.n_features
        features = places - tokens * block.n_features
        values = sampled_product(block.x, block.W, ends_of_tokens(tokens, block.n_tokens), features)
        values += block.b.index_select(0, features)
        if block.scale is not None:
            values *= block.scale.index_select(0, features)
        return self._above(values, places, features)

    def _in_full(self, block: Operands, span: slice) -> tuple[Tensor, Tensor]:
        """The same of a chunk from a product in full precision."""
        floor = self._finite(span)
        a = activations_at(block, span)
        at = places_reaching(a, torch.nextafter(floor, torch.full_like(floor, torch.inf)))
        return self._above(
            a.flatten().index_select(0, at),
            in_block(at, span, a.shape[1], block.n_features),
            at % a.shape[1] + span.start,
        )

    def _above(self, values: Tensor, places: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        floor = self.floor if len(self.floor) == 1 else self.floor.index_select(0, features)
        at = (values > floor).nonzero().squeeze(1)
        return values.index_select(0, at), places.index_select(0, at)

    def _finite(self, span: slice) -> Tensor:
        """The floors of a chunk, [1] or [C].

        An activation that left the range of float32 is above no infinite floor: values are compared in the end.
        """
        floor = self.floor if len(self.floor) == 1 else self.floor[span]
        return floor.clamp(max=torch.finfo(floor.dtype).max)


def in_block(places: Tensor, span: slice, width: int, n_features: int) -> Tensor:
    """Places in a flat [T, F] of those in a flat chunk [T, width] of the features of `span`."""
    return (places // width).mul_(n_features - width).add_(places).add_(span.start)


def in_whole_rows(block: Operands, floor: Tensor) -> Entries:
    """Entries of dense rows of activations, a few tokens at a time."""
    found = []
    for at, part in row_blocks(block):
        a = scratch(block.b, part.n_tokens, block.n_features)
        dense_activations(part, a)
        tokens, features = (a > floor).nonzero(as_tuple=True)
        found.append(Entries(a[tokens, features], tokens + at.start, features))
    return join(found)


def row_blocks(operands: Operands) -> Iterator[tuple[slice, Operands]]:
    """(some tokens, their operands): few enough for whole rows of activations."""
    n_features, d = operands.W.shape
    step = max(FEWEST_TOKENS, min(ROW_ELEMENTS // n_features, ROW_TOKEN_ELEMENTS // d))
    for start in range(0, operands.n_tokens, step):
        at = slice(start, min(start + step, operands.n_tokens))
        yield at, operands.of_tokens(at)


def dense_activations(operands: Operands, out: Tensor) -> None:
    """(x W^T + b) * scale into `out` [B, F], before the relu."""
    x, W, b, scale, *_ = operands = operands.raised()
    if W.dtype == x.dtype:
        torch.addmm(b, x, W.t(), out=out)
        if scale is not None:
            out.mul_(scale)
        return
    for span in candidate_spans(operands):
        out[:, span] = activations_at(operands, span)[:, : span.stop - span.start]

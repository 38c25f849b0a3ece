"""How a block of tokens is looked at, chunk by chunk of features: through which screen, and how much at once.

What is filtered at once, [T, C], stays in the cache, and so do the weights that are multiplied at once. Both are small
beside [T, F], and large enough that what a chunk costs besides its product does not count.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from ..encoder import Operands
from .column_filter import places_reaching
from .plain_screen import PlainScreen, is_plain
from .screen_entries import seen_above

# bytes of a product [T, C]
LEAST_PRODUCT, MOST_BOUNDED, MOST_PRODUCT = 1 << 19, 1 << 21, 1 << 22
# of the bytes of a float32 [T, F], what the product of a screen and the tokens that were rounded for it share, of a
# dictionary of at least so many features
SHARE, FEATURES = 0.03, 1 << 16
# elements of weights that are raised for a product in full precision, and of those that need not be
RAISED_ELEMENTS = 1 << 19
WEIGHT_ELEMENTS = 1 << 22


class LookThrough:
    """A block of tokens and the first screen of the search's that suits it, until that is dropped."""

    def __init__(self, block: Operands, screens: list[str]) -> None:
        self.block, self.screens = block, screens
        usable = block.screen is not None and block.screen.in_range
        self._left = [name for name in screens if usable and (name != "plain" or is_plain(block))]

    @property
    def screen(self) -> str | None:
        return self._left[0] if self._left else None

    @cached_property
    def full(self) -> Operands:
        """The block for products in full precision."""
        return self.block.raised()

    @cached_property
    def plain(self) -> PlainScreen:
        return PlainScreen(self.block)

    def drop(self) -> None:
        """The screen in use, for this block and those that come."""
        self.screens.remove(self._left.pop(0))

    def let_go(self) -> None:
        """Of what was made of the tokens to look at them."""
        if self.block.screen is not None:
            self.block.screen.let_go()

    def count(self, seen: int, left: int) -> None:
        """Of the entries of a chunk, how many a look has left open."""
        assert self.block.screen is not None
        self.block.screen.looks.see_entries(seen, left)

    def width(self) -> int:
        """Features a chunk."""
        n_tokens, d, b = self.block.n_tokens, self.block.x.shape[1], self.block.b
        if self.screen is not None:
            room, most = SHARE * 4 * n_tokens * max(self.block.n_features, FEATURES), MOST_PRODUCT
            if self.screen == "bounded":  # tokens and weights are held rounded too
                room, most = room - 2 * n_tokens * d, MOST_BOUNDED
            width = int(min(max(room, LEAST_PRODUCT), most)) // (2 * n_tokens)
        else:
            elements = WEIGHT_ELEMENTS if self.block.W.dtype == b.dtype else RAISED_ELEMENTS
            width = min(MOST_PRODUCT // (b.element_size() * n_tokens), elements // d)
        return max(64, width // 64 * 64)

    def through(self, span: slice, floor: Tensor) -> Tensor | None:
        """int64 [n]: where a chunk [T, C], flat, may lie above its floor, [1] or [C]; None out of range."""
        if self.screen == "plain":
            return self.plain.places(span, floor)
        seen = seen_above(self.block, span, floor)
        return None if seen is None else places_reaching(seen, seen.new_zeros(1))

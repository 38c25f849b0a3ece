"""How a block of tokens is looked at, chunk by chunk of features: through which screen, and how much at once.

What is filtered at once, [T, C], stays in the cache, and so do the weights that are multiplied at once. Both are small
beside [T, F], and large enough that what a chunk costs besides its product does not count.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..encoder import Operands
from .bounded_screen import BoundedScreen
from .plain_screen import PlainScreen, is_plain
from .products import FEWEST_TOGETHER

# bytes of a product [T, C], of a screen and in full precision
LEAST_PRODUCT, MOST_SEEN, MOST_PRODUCT = 1 << 19, 1 << 21, 3 << 20
# of a block, so that a chunk of as few features as make a fast product is not larger
MOST_TOKENS = MOST_SEEN // (2 * FEWEST_TOGETHER)
# of the bytes of a float32 [T, F], what a search may hold of tokens, weights and their product, of a dictionary of at
# least so many features
SHARE, FEATURES = 0.03, 1 << 16
# of that share, what the product of a screen gets beside the tokens rounded for it, and where none are
OF_PRODUCT, OF_PRODUCT_ALONE = 1 / 5, 1 / 3
# elements of weights that are raised for a product in full precision, and of that share; and of those that need not be
RAISED_ELEMENTS, OF_RAISED = 1 << 19, 1 / 4
WEIGHT_ELEMENTS = 1 << 22
# for so few tokens no share counts: a chunk would be over before its product pays
FEW_TOKENS = 32


def room_of(n_tokens: int, n_features: int) -> float:
    """Bytes that a search through [T, F] may hold."""
    return SHARE * 4 * n_tokens * max(n_features, FEATURES)


def is_held(block: Operands) -> bool:
    """Whether its tokens and weights are what a plain screen multiplies, so that nothing is made of them."""
    return block.W.dtype == block.x.dtype == torch.bfloat16 and block.prepare is None


class LookThrough:
    """A block of tokens and the first screen of the search's that suits it, until that is dropped.

    Args:
        room: bytes that the search may hold.
    """

    def __init__(self, block: Operands, floor: Tensor, screens: list[str], room: float) -> None:
        self.block, self.floor, self.screens, self.room = block, floor, screens, room
        usable = bool(screens) and block.screen is not None and block.screen.in_range
        self._left = [name for name in screens if usable and (name != "plain" or is_plain(block))]

    @property
    def screen(self) -> str | None:
        return self._left[0] if self._left else None

    @cached_property
    def full(self) -> Operands:
        """The block for products in full precision."""
        return self.block.raised()

    @cached_property
    def _look(self) -> PlainScreen | BoundedScreen:
        return (PlainScreen if self.screen == "plain" else BoundedScreen)(self.block, self.floor)

    def drop(self) -> None:
        """The screen in use, for this block and those that come."""
        self.screens.remove(self._left.pop(0))
        self.let_go()

    def let_go(self) -> None:
        """Of what was made of the tokens to look at them."""
        self.__dict__.pop("_look", None)
        if self.block.screen is not None:
            self.block.screen.let_go()

    def width(self) -> int:
        """Features a chunk."""
        n_tokens, d, b = self.block.n_tokens, self.block.x.shape[1], self.block.b
        if self.screen is None:
            elements = WEIGHT_ELEMENTS if self.block.W.dtype == b.dtype else self._raised_elements()
            return max(64, min(MOST_PRODUCT // (b.element_size() * n_tokens), elements // d) // 64 * 64)
        if self.screen == "plain" and is_held(self.block):
            room = OF_PRODUCT_ALONE * self.room
        else:
            room = OF_PRODUCT * (self.room - 2 * n_tokens * d)
        most = int(min(max(room, LEAST_PRODUCT), MOST_SEEN)) // (2 * n_tokens)
        part = min(self._look.part, max(FEWEST_TOGETHER, most // 64 * 64))
        return max(1, most // part) * part

    def _raised_elements(self) -> int:
        """Of weights that are raised at once, beside the tokens that were."""
        x, size = self.block.x, self.block.b.element_size()
        if len(x) <= FEW_TOKENS:
            return max(FEWEST_TOGETHER * x.shape[1], RAISED_ELEMENTS)
        room = self.room if self.block.is_exact else self.room - size * x.numel()
        return max(FEWEST_TOGETHER * x.shape[1], min(RAISED_ELEMENTS, int(OF_RAISED * room) // size))

    def through(self, span: slice) -> tuple[Tensor, Tensor] | None:
        """int64 [n]: (token, feature) of those of a span that may lie above their floor; None out of range."""
        return self._look.places(span)

"""What an encoder computes with, said once a step: a = relu((x - b_dec) W^T + b) * scale, [B, F].

B tokens, d = d_in, F = d_sae; W is W_enc.T, each feature's weights contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rounded_tokens import Prepare, RoundedTokens, prepare_into
from .row_gradients import RowSource


class Share(NamedTuple):
    """Of what the tokens and features of this process are a part, where both are spread over several.

    n_tokens, n_features: of all processes. first: how many of these tokens stand before ours.
    """

    n_tokens: int
    n_features: int
    first: int


class Operands(NamedTuple):
    """What scores and searches multiply: no gradient, in the dtype of the products, that of b, centred.

    x: [B, d], as given where a search above thresholds takes it so: `exact` has what is multiplied. W: [F, d], of any
    dtype. b: [F]. scale: [F] or None. members: int64 [P], ascending, the features that a search looks at; None for all.
    screen: x in bfloat16 where scores and searches look through such products first. share: for a batch that is spread
    over processes; None for a whole one. prepare: of tokens as given; None where their dtype alone has to change.
    """

    x: Tensor
    W: Tensor
    b: Tensor
    scale: Tensor | None = None
    members: Tensor | None = None
    screen: RoundedTokens | None = None
    share: Share | None = None
    prepare: Prepare | None = None

    @property
    def n_tokens(self) -> int:
        return self.x.shape[0]

    @property
    def n_features(self) -> int:
        """F, whatever `members` says."""
        return self.W.shape[0]

    @property
    def whole_shape(self) -> tuple[int, int]:
        """(B, F) of all processes."""
        return (self.x.shape[0], self.W.shape[0]) if self.share is None else self.share[:2]

    @property
    def n_candidates(self) -> int:
        """P, or F where all features are candidates."""
        return self.W.shape[0] if self.members is None else len(self.members)

    def among(self, members: Tensor | None) -> Operands:
        """The same with these candidates."""
        return self._replace(members=members)

    def of_tokens(self, at: slice | Tensor) -> Operands:
        """The same for some of the tokens."""
        screen = None if self.screen is None else self.screen.of_tokens(at)
        return self._replace(x=self.x[at], screen=screen)

    def exact(self, at: slice | Tensor) -> Tensor:
        """Some of the tokens as they are multiplied, [n, d] in the dtype of the products."""
        rows = self.x[at]
        return rows.to(self.b.dtype) if self.prepare is None else self.prepare(rows)

    @property
    def is_exact(self) -> bool:
        """Whether x is what is multiplied."""
        return self.prepare is None and self.x.dtype == self.b.dtype

    def raised(self) -> Operands:
        """The same with all tokens as they are multiplied."""
        if self.is_exact:
            return self
        room = self.x.new_empty(self.x.shape, dtype=self.b.dtype)
        return self._replace(x=prepare_into(room, self.x, self.prepare), prepare=None)

    def in_full(self) -> Operands:
        """The same without a screen."""
        return self._replace(screen=None)

    def screened_for(self, n_kept: int, most: float) -> Operands:
        """Without a screen where more than the share `most` of the candidates is kept, so that looks are in vain."""
        return self if n_kept <= most * self.n_tokens * self.n_candidates else self.in_full()

    def of_features(self, features: Tensor) -> Operands:
        """An encoder of those features alone, int64 [P]: their weights are copied."""
        scale = None if self.scale is None else self.scale.index_select(0, features)
        W, b = self.W.index_select(0, features), self.b.index_select(0, features)
        screen = None if self.screen is None else self.screen.of_features(features)
        return Operands(self.x, W, b, scale, screen=screen, share=self.share, prepare=self.prepare)


class LateTokens(NamedTuple):
    """Tokens that are prepared where they are needed. dtype: that of the products. prepare: as in `Operands`."""

    dtype: torch.dtype
    prepare: Prepare | None


class Encoder(NamedTuple):
    """The leaves of a step, with their gradients, and the operands made of them.

    x: [B, d], b_dec not yet subtracted. W: [F, d]. b: [F]. b_dec: [d], or None where it is not subtracted. scale: [F]
    or None; it gets no gradient. rows: where the gradients of W and b go. operands: see there.
    """

    x: Tensor
    W: Tensor
    b: Tensor
    b_dec: Tensor | None
    scale: Tensor | None
    rows: RowSource
    operands: Operands

    @property
    def shape(self) -> tuple[int, int]:
        """(B, F), that of the codes."""
        return self.x.shape[0], self.W.shape[0]

    def of_share(self, share: Share | None) -> Encoder:
        """The same, of a part of a batch."""
        return self if share is None else self._replace(operands=self.operands._replace(share=share))

    def only(self, some: Tensor) -> Encoder:
        """The same, where features outside `some`, bool [F], are never active: their bias is -inf."""
        b, full = (torch.where(some, t, -torch.inf) for t in (self.b, self.operands.b))
        return self._replace(b=b, operands=self.operands._replace(b=full))

    def weights_alone(self) -> Encoder:
        """An encoder of the same centred input whose gradient reaches W and b alone; no scale."""
        operands = self.operands._replace(scale=None)
        return Encoder(operands.x, self.W, self.b, None, None, self.rows, operands)

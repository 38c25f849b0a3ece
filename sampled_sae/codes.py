"""`SparseCodes`: the kept activations of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .torch_impl.entries import EntryIndex


class SparseCodes:
    """The kept entries of a [B, F] activation matrix, sorted by token, then feature.

    Attributes:
        values: [n], the activations; they carry the gradient.
        tokens: int64 [n], row of each entry.
        features: int64 [n], column of each entry.
        shape: (B, F).

    Equivalent to `torch.sparse_coo_tensor([tokens, features], values, shape)`. A small pool is kept as the
    masked block [B, P] it was computed in, and listed entry by entry when first asked for.
    """

    def __init__(self, values: Tensor, tokens: Tensor, features: Tensor, shape: tuple[int, int]) -> None:
        self._entries: tuple[Tensor, Tensor, Tensor] | None = (values, tokens, features)
        self.block: Tensor | None = None
        self.pool: Tensor | None = None
        self.index: EntryIndex | None = None
        self.shape = shape

    @classmethod
    def from_block(cls, block: Tensor, pool: Tensor, n_features: int) -> SparseCodes:
        """From a block [B, P] that is zero where nothing is kept, and its features int64 [P], ascending."""
        codes = cls.__new__(cls)
        codes._entries = None
        codes.block, codes.pool, codes.index = block, pool, None
        codes.shape = (block.shape[0], n_features)
        return codes

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseCodes:
        """From a dense [B, F] tensor: its entries other than zero."""
        tokens, features = dense.detach().nonzero(as_tuple=True)
        return cls(dense[tokens, features], tokens, features, (dense.shape[0], dense.shape[1]))

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(values, tokens, features)."""
        if self._entries is None:
            assert self.block is not None
            assert self.pool is not None
            tokens, columns = self.block.detach().nonzero(as_tuple=True)
            self._entries = (self.block[tokens, columns], tokens, self.pool[columns])
        return self._entries

    @property
    def values(self) -> Tensor:
        return self.entries()[0]

    @property
    def tokens(self) -> Tensor:
        return self.entries()[1]

    @property
    def features(self) -> Tensor:
        return self.entries()[2]

    @property
    def device(self) -> torch.device:
        return (self.values if self.block is None else self.block).device

    def count(self) -> int:
        """Number of kept entries."""
        return int(self.block.count_nonzero()) if self.block is not None else len(self.values)

    def l0(self) -> float:
        """Mean number of active features a token."""
        return self.count() / self.shape[0]

    def active_features(self) -> Tensor:
        """int64, ascending: the features with at least one kept entry."""
        if self.block is not None:
            assert self.pool is not None
            return self.pool[(self.block.detach() != 0).any(0)]
        return torch.unique(self.features)

    def smallest(self) -> float | None:
        """The smallest kept activation, or None where nothing is kept."""
        kept = self.values.detach() if self.block is None else self.block.detach()
        if self.block is not None:
            kept = torch.where(kept > 0, kept, torch.inf)
        smallest = float(kept.min()) if kept.numel() else torch.inf
        return None if smallest == torch.inf else smallest

    def to_dense(self) -> Tensor:
        """[B, F], differentiable. Costs a full matrix."""
        values, tokens, features = self.entries()
        dense = values.new_zeros(self.shape)
        return dense.index_put((tokens, features), values)

    def to_sparse_csr(self) -> Tensor:
        """The same as `to_dense().to_sparse_csr()`, without the dense matrix; detached."""
        values, tokens, features = self.entries()
        counts = torch.bincount(tokens, minlength=self.shape[0])
        crow = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return torch.sparse_csr_tensor(crow, features, values.detach(), self.shape, check_invariants=False)

    def detach(self) -> SparseCodes:
        values, tokens, features = self.entries()
        return SparseCodes(values.detach(), tokens, features, self.shape)

    def __repr__(self) -> str:
        return f"SparseCodes(shape={self.shape}, kept={self.count()}, l0={self.l0():.2f})"

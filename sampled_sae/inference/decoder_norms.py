"""The norms of decoder rows, computed once for the same weights."""

from __future__ import annotations

import torch
from torch import Tensor

# elements of W_dec that are raised to float32 at once
CHUNK_ELEMENTS = 1 << 22


class DecoderNorms:
    """Keeps the norms of the last W_dec that was asked for, and looks again where it has changed since."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, int] | None = None
        self._norms: Tensor | None = None

    def of(self, W_dec: Tensor) -> Tensor:
        """[F] of the rows of W_dec [F, d], in at least float32."""
        if self._norms is None or self._known is None or not _same(self._known, W_dec):
            step = max(1, CHUNK_ELEMENTS // W_dec.shape[1])
            exact = torch.promote_types(W_dec.dtype, torch.float32)
            parts = [torch.linalg.vector_norm(rows.to(exact), dim=1) for rows in W_dec.split(step)]
            self._known, self._norms = (W_dec, W_dec._version), torch.cat(parts)
        return self._norms

    def inverse_of(self, W_dec: Tensor) -> Tensor:
        """[F], 1 / norm; 0 for a row of zeros, which adds nothing."""
        norms = self.of(W_dec)
        return torch.where(norms > 0, 1 / norms, 0)


def _same(known: tuple[Tensor, int], W_dec: Tensor) -> bool:
    return known[0] is W_dec and known[1] == W_dec._version

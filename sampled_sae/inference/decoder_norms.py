"""Decoder rows: their norms, and unit rows.

Norms are not remembered: weights may be changed in ways that nobody is told of.
"""

from __future__ import annotations

import torch
from torch import Tensor

# elements of W_dec that are raised to float32 at once
CHUNK_ELEMENTS = 1 << 22


def decoder_norms(W_dec: Tensor, features: Tensor | None = None) -> Tensor:
    """[F] of the rows of W_dec [F, d], or [P] of those of the features, in at least float32."""
    rows = W_dec if features is None else W_dec.index_select(0, features)
    exact = torch.promote_types(W_dec.dtype, torch.float32)
    parts = rows.split(max(1, CHUNK_ELEMENTS // W_dec.shape[1]))
    return torch.cat([torch.linalg.vector_norm(part.to(exact), dim=1) for part in parts])


def unit_rows(W_dec: Tensor) -> Tensor:
    """float32 [F, d], rows divided by their norms, however large or small; a row of zeros stays one.

    Equivalent to `torch.nn.functional.normalize(W_dec, dim=1)`, whose squares overflow, underflow and meet its eps.
    """
    rows = W_dec.to(torch.promote_types(W_dec.dtype, torch.float32))
    greatest = rows.abs().amax(1, keepdim=True)
    return torch.nn.functional.normalize((rows / torch.where(greatest > 0, greatest, 1)).float(), dim=1)


def inverse_norms(W_dec: Tensor, features: Tensor | None = None) -> Tensor:
    """1 / norm; 0 for a row of zeros, which adds nothing."""
    norms = decoder_norms(W_dec, features)
    return torch.where(norms > 0, 1 / norms, 0)

"""`impl="reference"`: the specification behind the interface that torch_impl/layer.py and triton_impl/layer.py share.

W is W_enc.T, [F, d]. Gradients are dense and autograd's; `rows` and `hint` have no meaning here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..codes import Selection, SparseCodes
from ..reference import candidate_pool

__all__ = ["above_threshold", "aux_loss", "candidate_pool", "centre", "column_scores", "decode", "select"]


def centre(x: Tensor, b_dec: Tensor | None) -> Tensor:
    """x - b_dec with its gradient, in the dtype to compute in."""
    dtype = reference.compute_dtype(x)
    return x.to(dtype) if b_dec is None else x.to(dtype) - b_dec.to(dtype)


def column_scores(x: Tensor, W: Tensor, b: Tensor, score: str, scale: Tensor | None) -> Tensor:
    return reference.column_scores(reference.encode(x, W.t(), b, scale), score)


def select(
    x: Tensor,
    b_dec: Tensor | None,
    centred: Tensor,
    W: Tensor,
    b: Tensor,
    members: Tensor | None,
    *,
    k: float,
    select: str = "batch",
    scale: Tensor | None = None,
    hint: Any = None,
    rows: Any = None,
) -> Selection:
    a = reference.encode(centred, W.t(), b, scale)
    return Selection(SparseCodes.from_dense(reference.select_inside(a, members, k, select)), None)


def above_threshold(x: Tensor, b_dec: Tensor | None, W: Tensor, b: Tensor, threshold: Tensor) -> SparseCodes:
    a = reference.encode(centre(x, b_dec), W.t(), b)
    return SparseCodes.from_dense(torch.where(a > threshold, a, 0))


def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, rows: Any = None) -> Tensor:
    return reference.decode(codes.to_dense(), W_dec, b_dec)


def aux_loss(
    x: Tensor,
    x_hat: Tensor,
    b_dec: Tensor | None,
    W: Tensor,
    b: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    *,
    k_aux: int,
    aux_pool: int | None,
    score: str,
    scores: Tensor | None = None,
    rows: Any = None,
) -> Tensor:
    centred = centre(x, b_dec).detach()
    return reference.aux_loss(
        x.to(x_hat.dtype),
        x_hat,
        centred,
        W.t(),
        b,
        W_dec,
        dead,
        k_aux=k_aux,
        aux_pool=aux_pool,
        scores=column_scores(centred, W, b, score, None) if scores is None else scores,
    )

"""The dead-feature loss of METHOD.md, step 6, in sizes that do not depend on how many features are dead.

The candidates are always `aux_pool` features: the dead ones of highest score and, where fewer are dead, live ones
whose activations are put out by a bias of -inf. One dense product, one selection per token, one dense product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..row_gradients import RowSource
from ..torch import aux_loss as torch_aux
from . import layer
from .ops import top_pool


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
    rows: RowSource | None = None,
) -> Tensor:
    """As torch_impl's, which serves for aux_pool=None, where the number of dead features has to be known."""
    rows = rows if rows is not None else RowSource()
    if aux_pool is None:
        return torch_aux.aux_loss(
            x, x_hat, b_dec, W, b, W_dec, dead, k_aux=k_aux, aux_pool=None, score=score, rows=rows
        )
    residual = (x.to(x_hat.dtype) - x_hat).detach()
    centred = layer.centre(x, b_dec)
    if scores is None:
        scores = layer.column_scores(centred, W.detach(), b.detach(), score, None)
    # One bit pattern up: a dead feature of score 0 still ranks above every live one.
    keys = torch.where(dead, (scores.view(torch.int32) + 1).view(torch.float32), 0)
    members = top_pool(keys, min(aux_pool, W.shape[0]))
    b_masked = torch.where(dead, b, -torch.inf)
    codes = layer.block_codes(x.detach(), None, W, b_masked, centred, None, members, k_aux, True, rows)
    e_hat = layer.decode(codes, W_dec, None, rows)
    denominator = (residual - residual.mean(0)).square().sum(-1).mean()
    defined = dead.any() & (denominator > 0)
    share = (residual - e_hat).square().sum(-1).mean() / torch.where(defined, denominator, 1)
    return torch.where(defined, share, 0)

"""The dead-feature loss of METHOD.md, step 6 (arXiv 2406.04093, appendix A.2), without a [B, F] tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes import SparseCodes
from ..row_gradients import RowSource
from . import layer
from .pool import candidate_pool
from .scores import column_statistics, finish_scores
from .stream import stream_token


@layer.without_autocast
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
    """The share of the residual's variance that the dead features leave unexplained.

    Args:
        x, x_hat: [B, d]; no gradient flows into them, nor into b_dec, [d] or None, which is subtracted from x.
        W, b, W_dec: [F, d], [F], [F, d]; the only tensors that receive gradient.
        dead: bool [F].
        k_aux: features a token; the largest positive activations among the candidates.
        aux_pool: with more dead features than this, those of highest column score are the candidates.
        score, scores: the score's name, and the scores [F] of this batch where the pool needed them.

    Returns:
        mean ||e - e_hat||^2 / mean ||e - mean(e)||^2 with e = x - x_hat, 0-dim; 0 with no dead feature or a zero
        denominator.
    """
    rows = rows if rows is not None else RowSource()
    residual = (x.to(x_hat.dtype) - x_hat).detach()
    centred = layer.centre(x, b_dec)
    members = dead.nonzero().squeeze(1)
    denominator = (residual - residual.mean(0)).square().sum(-1).mean()
    if len(members) == 0 or denominator == 0:
        return residual.new_zeros(())
    if aux_pool is not None and len(members) > aux_pool:
        if scores is None:
            few = W.detach()[members]
            bias = b.detach()[members].to(centred.dtype)
            dead_scores = finish_scores(column_statistics(centred, few, bias, score), score)
        else:
            dead_scores = scores[members]
        members = members[candidate_pool(dead_scores, aux_pool)]
    if aux_pool is not None:
        taken = rows.gather("W_enc", W, members, centred.dtype)
        b_taken = rows.gather("b_enc", b, members, centred.dtype)
        a = torch.addmm(b_taken, centred, taken.t())
        block = torch.where(layer.block_mask(a.detach(), k_aux, "token"), a, 0)
        codes = SparseCodes.from_block(block, members, W.shape[0])
    else:
        bias = b.detach().to(centred.dtype)
        found = stream_token(centred, W.detach(), bias, None, members, min(k_aux, len(members)))
        codes = layer.entry_codes(centred, None, W, b, centred, None, found, rows)
    e_hat = layer.decode(codes, W_dec, None, rows)
    return (residual - e_hat).square().sum(-1).mean() / denominator

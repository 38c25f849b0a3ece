"""The dead-feature loss of METHOD.md, step 6 (arXiv 2406.04093, appendix A.2), without a [B, F] tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import SparseCodes
from .ranking import candidate_pool
from .torch_impl import layer
from .torch_impl.rows import RowSource
from .torch_impl.scores import column_statistics, finish_scores
from .torch_impl.stream import stream_token


def aux_loss(
    residual: Tensor,
    centred: Tensor,
    W: Tensor,
    b: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    *,
    k_aux: int,
    aux_pool: int | None,
    score: str,
    scores: Tensor | None,
    rows: RowSource,
) -> Tensor:
    """The share of the residual's variance that the dead features leave unexplained.

    Args:
        residual: e = x - x_hat [B, d], detached.
        centred: the encoder's input [B, d], detached.
        W, b, W_dec: [F, d], [F], [F, d]; the only tensors that receive gradient.
        dead: int64 [D], the dead features, ascending.
        k_aux: features a token; the largest positive activations among the candidates.
        aux_pool: with more dead features than this, those of highest column score are the candidates.
        score, scores: the score's name, and the scores [F] of this batch where the pool needed them.

    Returns:
        mean ||e - e_hat||^2 / mean ||e - mean(e)||^2, 0-dim; 0 with no dead feature or a zero denominator.
    """
    denominator = (residual - residual.mean(0)).square().sum(-1).mean()
    if len(dead) == 0 or denominator == 0:
        return residual.new_zeros(())
    if aux_pool is not None and len(dead) > aux_pool:
        if scores is None:
            few = W.detach()[dead]
            bias = b.detach()[dead].to(centred.dtype)
            dead_scores = finish_scores(column_statistics(centred, few, bias, score), score)
        else:
            dead_scores = scores[dead]
        dead = dead[candidate_pool(dead_scores, aux_pool)]
    if aux_pool is not None:
        taken = rows.gather("W_enc", W, dead, centred.dtype)
        b_taken = rows.gather("b_enc", b, dead, centred.dtype)
        a = torch.addmm(b_taken, centred, taken.t())
        block = torch.where(layer.block_mask(a.detach(), k_aux, "token"), a, 0)
        codes = SparseCodes.from_block(block, dead, W.shape[0])
    else:
        bias = b.detach().to(centred.dtype)
        found = stream_token(centred, W.detach(), bias, None, dead, min(k_aux, len(dead)))
        codes = layer.entry_codes(centred, None, W, b, centred, None, found, rows)
    e_hat = layer.decode(codes, W_dec, None, rows)
    return (residual - e_hat).square().sum(-1).mean() / denominator

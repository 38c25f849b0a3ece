"""The parts of dictionary_learning's training step, and what it does otherwise than `SampledSAE` and `RowAdam`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...codes import Selection
from ...impl.interface import Implementation
from ...impl.pool import Pool
from ...impl.row_gradients import RowSource
from ...impl.torch.row_adam import rows_a_chunk
from ...sae import SampledSAE


class Batch(NamedTuple):
    """A batch: x [B, d], x - b_dec without gradient, its pool, where gradients of rows go, only to log it or not."""

    parts: Implementation
    x: Tensor
    centred: Tensor
    pool: Pool | None
    rows: RowSource
    logging: bool


def selection(
    sae: SampledSAE, batch: Batch, members: Tensor | None, k: float, select: str, hint: float | Tensor | None
) -> Selection:
    """What the batch keeps inside the pool `members`, None for every feature."""
    return batch.parts.select(
        batch.x,
        sae.b_dec,
        batch.centred,
        sae.W_enc.t(),
        sae.b_enc,
        members,
        k=k,
        select=select,
        hint=hint,
        rows=batch.rows,
    )


def aux_candidates(sae: SampledSAE, batch: Batch, dead: Tensor) -> Tensor:
    """int64, ascending: the dead features, of dead bool [F]; of more than `aux_pool` those of highest score."""
    c = sae.cfg
    members = dead.nonzero().squeeze(1)
    if c.aux_pool is None or len(members) <= c.aux_pool:
        return members
    if batch.pool is not None:
        scores = batch.pool.scores[members]
    else:
        W, b = sae.W_enc.detach().t()[members], sae.b_enc.detach()[members]
        scores = batch.parts.column_scores(batch.centred, W, b, c.score, None)
    return members[batch.parts.candidate_pool(scores, c.aux_pool)]


def unexplained(
    sae: SampledSAE, batch: Batch, members: Tensor, residual: Tensor, k_aux: int, hint: float | Tensor | None
) -> tuple[Tensor, float | Tensor | None]:
    """Mean squared error of the residual [B, d] from the k_aux largest activations a token among `members`, and a hint.

    As in dictionary_learning, and other than in `SampledSAE`, b_dec receives its gradient too.
    """
    codes, hint = selection(sae, batch, members, max(1, min(k_aux, len(members))), "token", hint)
    e_hat = batch.parts.decode(codes, sae.W_dec, None, batch.rows)
    return (residual - e_hat).square().sum(-1).mean(), hint


@torch.no_grad()
def project_decoder_rows(sae: SampledSAE) -> None:
    """Removes from the gradient rows of W_dec what is parallel to W_dec's own, before the norm is clipped.

    RowAdam does so after clipping; the norm of what is left is what dictionary_learning clips.
    """
    for part in sae.row_grads:
        if part.name != "W_dec" or part.rows.grad is None:
            continue
        size = rows_a_chunk(sae.W_dec) if sae.W_dec.device.type == "cpu" else len(part.features)
        for features, grad in zip(part.features.split(size), part.rows.grad.split(size)):
            W = sae.W_dec.index_select(0, features).to(grad.dtype)
            grad.sub_((grad * W).sum(1, keepdim=True) * W)

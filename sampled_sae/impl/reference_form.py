"""`impl="reference"`: the specification behind the interface that torch/layer.py and triton/layer.py share.

Gradients are dense and autograd's; where rows of gradients go and where a search starts have no meaning here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ..codes import Entries, SparseCodes
from ..reference import candidate_pool
from .dead_features import AuxRule
from .encoder import Encoder, Operands
from .gate import Gate
from .hints import Rule, ThresholdHints
from .row_gradients import RowSource
from .torch.products import without_autocast


def encoder(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    b_dec: Tensor | None = None,
    scale: Tensor | None = None,
    rows: RowSource | None = None,
    screen: str = "off",
) -> Encoder:
    """What this step computes with, in the dtype to compute in."""
    operands = Operands(centred(x, b_dec).detach(), W.detach(), b.detach(), None if scale is None else scale.detach())
    return Encoder(x, W, b, b_dec, scale, rows if rows is not None else RowSource(), operands)


def centred(x: Tensor, b_dec: Tensor | None) -> Tensor:
    """x - b_dec with its gradient."""
    dtype = reference.compute_dtype(x)
    return x.to(dtype) if b_dec is None else x.to(dtype) - b_dec.to(dtype)


@without_autocast
def activations(encoder: Encoder) -> Tensor:
    """[B, F], with gradient."""
    x = centred(encoder.x, encoder.b_dec)
    return reference.encode(x, encoder.W.t(), encoder.b, encoder.scale)


@without_autocast
def column_scores(operands: Operands, score: str) -> Tensor:
    a = reference.encode(operands.x, operands.W.t(), operands.b, operands.scale)
    return reference.column_scores(a, score)


def column_bounds(operands: Operands, score: str) -> None:
    """Scores are computed in full here."""


def select(encoder: Encoder, members: Tensor | None, rule: Rule, hints: ThresholdHints | None = None) -> SparseCodes:
    return SparseCodes.from_dense(reference.select_inside(activations(encoder), members, rule.k, rule.select))


def encode_at(encoder: Encoder, entries: Entries) -> SparseCodes:
    values = activations(encoder)[entries.tokens, entries.features]
    return SparseCodes(values, entries.tokens, entries.features, encoder.shape)


def above_threshold(encoder: Encoder, threshold: Tensor, gate: Gate | None = None) -> SparseCodes:
    return SparseCodes.from_dense(dense_above_threshold(encoder, threshold, gate))


@without_autocast
def dense_above_threshold(encoder: Encoder, threshold: Tensor, gate: Gate | None = None) -> Tensor:
    if gate is None:
        return reference.above(activations(encoder), threshold)
    x = centred(encoder.x, encoder.b_dec)
    return reference.above(reference.gated(x @ encoder.W.t().to(x.dtype), *gate), threshold)


@without_autocast
def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, rows: RowSource | None = None) -> Tensor:
    return reference.decode(codes.to_dense(), W_dec, b_dec)


@without_autocast
def decode_levels(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, groups: Sequence[int], rows: RowSource | None = None
) -> Tensor:
    return reference.decode_levels(codes.to_dense(), W_dec, b_dec, groups)


@without_autocast
def aux_loss(
    encoder: Encoder,
    x_hat: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    rule: AuxRule,
    scores: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    return reference.aux_loss(
        (encoder.x if target is None else target).to(x_hat.dtype),
        x_hat,
        encoder.operands.x,
        encoder.W.t(),
        encoder.b,
        W_dec,
        dead,
        k_aux=rule.k_aux,
        aux_pool=rule.aux_pool,
        scores=column_scores(encoder.operands, rule.score) if scores is None else scores,
    )


def dead_candidates(operands: Operands, dead: Tensor, rule: AuxRule, scores: Tensor | None = None) -> Tensor:
    members = dead.nonzero().squeeze(1)
    if rule.aux_pool is None or len(members) <= rule.aux_pool:
        return members
    scores = column_scores(operands, rule.score) if scores is None else scores
    return members[candidate_pool(scores[members], rule.aux_pool)]

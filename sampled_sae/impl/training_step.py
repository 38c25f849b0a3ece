"""Steps 1 to 6 of docs/method.md in their order, on the parts of an implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..codes import SparseCodes
from ..config import SampledSAEConfig
from . import threshold
from .dead_features import AuxRule
from .encoder import Encoder
from .hints import Rule
from .interface import Implementation
from .layer_weights import LayerWeights
from .layout import Leaves
from .pool import Pool
from .torch.products import without_autocast
from .torch.reconstruction import errors_of_tokens


class Step(NamedTuple):
    """loss: of the reconstruction, without aux; mse, aux: 0-dim. x_hat: [B, d] in the units of the training."""

    loss: Tensor
    mse: Tensor
    aux: Tensor
    x_hat: Tensor
    codes: SparseCodes


def training_step(
    layer: LayerWeights, parts: Implementation, tokens: Tensor, encoder: Encoder, leaves: Leaves, pool: Pool | None
) -> Step:
    """One batch through the layer; moves its threshold and its counts of dead features.

    tokens: [B, d_out], to be reconstructed; `encoder` is of `leaves`, and but for a transcoder of them.
    pool: None for the whole dictionary.
    """
    c, memory = layer.cfg, layer.memory
    members = None if pool is None else pool.members
    codes = parts.select(encoder if pool is None else pool.of(encoder), members, Rule(c.k, c.select), memory.hints)
    loss, mse, x_hat = reconstruct(c, parts, tokens, encoder, leaves, codes)
    aux = mse.new_zeros(())
    counts = layer.layout.local(layer.tokens_since_active)
    if c.aux_coefficient > 0 and memory.idle.reaches(counts, c.dead_after, parts.totals.greatest):
        rule = AuxRule(c.aux_features, c.aux_pool, c.score)
        scores = None if pool is None else pool.scores
        dead = counts >= c.dead_after
        aux = parts.aux_loss(encoder, x_hat, leaves.W_dec, dead, rule, scores, tokens)
    active, n_tokens = parts.totals.active_mask(codes, members), encoder.operands.whole_shape[0]
    memory.idle.count_(counts, active, n_tokens, parts.totals.greatest)
    screen = encoder.operands.screen
    memory.looks = None if screen is None else screen.looks
    threshold.move(layer, parts.totals.smallest(codes), c.threshold_decay)
    return Step(loss, mse, aux, x_hat, codes)


def reconstruct(
    c: SampledSAEConfig, parts: Implementation, tokens: Tensor, encoder: Encoder, leaves: Leaves, codes: SparseCodes
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, mse, x_hat): mse is that of x_hat [B, d], and the loss too, but for a Matryoshka SAE."""
    if c.groups is None:
        b_out = leaves.b_out if parts.squared_errors is None else None
        x_hat = parts.decode(codes, leaves.W_dec, b_out, leaves.rows)
        if leaves.W_skip is not None:
            x_hat = x_hat + skipped(parts.totals.once(encoder.x), leaves.W_skip, x_hat.dtype)
        if parts.squared_errors is None:
            errors = errors_of_tokens(tokens, x_hat)
        else:
            x_hat, errors = parts.squared_errors(x_hat, leaves.b_out, tokens)
        mse = parts.totals.mean(errors, encoder.operands)
        return mse, mse, x_hat
    levels = parts.decode_levels(codes, leaves.W_dec, leaves.b_out, c.groups, leaves.rows)
    if leaves.W_skip is not None:
        levels = levels + skipped(parts.totals.once(encoder.x), leaves.W_skip, levels.dtype)[:, None]
    if parts.level_errors is None:
        errors = errors_of_tokens(tokens[:, None], levels)
    else:
        errors = parts.level_errors(tokens, levels)
    errors = parts.totals.mean(errors, encoder.operands)
    return errors.mean(), errors[-1], levels[:, -1].contiguous()


@without_autocast
def skipped(x: Tensor, W_skip: Tensor, dtype: torch.dtype) -> Tensor:
    """x W_skip, [B, d_out] in `dtype`, which is that of the codes, under autocast too: it has no sums of 16 bits."""
    return x.to(dtype) @ W_skip.to(dtype)

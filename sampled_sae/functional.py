"""The layer as functions: column scores, candidate pool, sampled top-k, decode.

`impl` is "auto", "triton", "torch" or "reference". "auto" takes Triton for tensors on a GPU, torch elsewhere;
`resolve_impl` says which. These functions check their arguments' values and so wait for a GPU; the module does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import SparseCodes
from .config import POOLS, SELECTS
from .impl.hints import Rule
from .impl.interface import implementation, resolve_impl
from .impl.pool import PoolRule, find_pool
from .impl.torch import layer as torch_layer
from .impl.torch.pool import candidate_pool as _candidate_pool
from .impl.torch.scores import threshold_counts as _threshold_counts
from .support.argument_checks import (
    SCORES,
    check_budget,
    check_choice,
    check_encoder,
    check_integer,
    check_same,
    describe,
)

__all__ = ["candidate_pool", "column_scores", "decode", "resolve_impl", "sampled_topk", "threshold_counts"]


def column_scores(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    score: str = "l2",
    scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """One score a feature over the batch; no gradient.

    Args:
        x: [..., d], the encoder's input, centred by the caller.
        W_enc, b_enc: [d, F], [F].
        score: with a = relu(x W_enc + b_enc) * scale, "l2": sqrt(sum_i a_ij^2), "l2_squared": its square,
            "entropy": -sum_i p_ij ln p_ij with p_ij = a_ij / sum_i a_ij, in nats, "uniform": 1 where any
            a_ij > 0.
        scale: [F] > 0 or None.

    Returns:
        [F] float32 (float64 for float64 inputs). For "l2" equivalent to
        `(torch.relu(x @ W_enc + b_enc) * scale).norm(dim=0)`.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: arXiv 2508.21324; the entropy in this form is docs/method.md's.
    """
    check_choice("score", score, SCORES)
    check_encoder(x, W_enc, b_enc, scale)
    parts = implementation(resolve_impl(impl, x.device, x.dtype))
    encoder = parts.encoder(x.reshape(-1, x.shape[-1]), W_enc.t(), b_enc, scale=scale)
    return parts.column_scores(encoder.operands, score)


def threshold_counts(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, thresholds: Tensor, scale: Tensor | None = None
) -> Tensor:
    """How many activations lie strictly above each threshold: B times the mean L0 that it would give.

    Args:
        x, W_enc, b_enc, scale: as for `column_scores`.
        thresholds: [m] >= 0, ascending, of x's dtype.

    Returns:
        int64 [m]; counts of several batches or processes add up. Equivalent to
        `(torch.relu(x @ W_enc + b_enc)[None] > thresholds[:, None, None]).sum((1, 2))`.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_encoder(x, W_enc, b_enc, scale)
    if not isinstance(thresholds, Tensor) or thresholds.dim() != 1 or thresholds.numel() == 0:
        raise ValueError(f"thresholds={describe(thresholds)}: must be a tensor of shape [m]")
    if not bool((thresholds >= 0).all()) or not bool((thresholds.diff() >= 0).all()):
        raise ValueError("thresholds: must be >= 0 and ascending")
    check_same(x=x, thresholds=thresholds)
    operands = torch_layer.encoder(x.reshape(-1, x.shape[-1]), W_enc.t(), b_enc, scale=scale).operands
    return _threshold_counts(operands, thresholds.to(operands.x.dtype))


def candidate_pool(scores: Tensor, size: int, pool: str = "top", generator: torch.Generator | None = None) -> Tensor:
    """The candidate features: int64 [min(size, F)], ascending.

    Args:
        scores: [F], >= 0.
        size: P >= 1.
        pool: "top": highest scores, ties to the lower index; equivalent to
            `scores.sort(descending=True, stable=True).indices[:size].sort().values`. "sample": without
            replacement with probability proportional to the score (Gumbel top-k); a feature of score 0 only
            after all others.
        generator: source of randomness for "sample".

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_choice("pool", pool, POOLS)
    size = check_integer("size", size, 1)
    if not isinstance(scores, Tensor) or scores.dim() != 1 or scores.numel() == 0:
        raise ValueError(f"scores={describe(scores)}: must be a tensor of shape [F]")
    if not bool((scores >= 0).all()):
        raise ValueError("scores: every value must be a number >= 0")
    return _candidate_pool(scores, size, pool, generator)


def sampled_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: float = 32,
    l: float | None = None,
    score: str = "l2",
    pool: str = "top",
    select: str = "batch",
    scale: Tensor | None = None,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> SparseCodes:
    """The kept activations of a batch: steps 1 to 4 of docs/method.md.

    Args:
        x: [..., d], centred by the caller; leading dimensions are flattened to B tokens.
        W_enc, b_enc: [d, F], [F].
        k: average (select="token": exact, whole) number of entries a token, in (0, F].
        l: pool multiplier >= 1, None for the whole dictionary (BatchTopK; TopK with select="token").
        score, pool: how the ceil(k*l) candidates are found; see `column_scores`, `candidate_pool`.
        select: "batch" keeps the round(B*k) largest positive entries inside the pool, "token" the k largest
            of each token. Ties go to the lower token, then the lower feature.
        scale: [F] > 0, multiplies the activations; no gradient.

    Returns:
        SparseCodes [B, F], differentiable in x, W_enc and b_enc through the kept entries; values in float32
        for 16-bit inputs. For l=None, select="batch" equivalent to
        `a = relu(x @ W_enc + b_enc); a * (a >= a.flatten().topk(round(B * k)).values[-1])`, ties aside.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed; NaN or inf in x.

    Source: arXiv 2508.21324 (pool), 2412.06410 (batch top-k), 2406.04093 (top-k).
    """
    score = check_choice("score", score, SCORES)
    pool = check_choice("pool", pool, POOLS)
    select = check_choice("select", select, SELECTS)
    check_encoder(x, W_enc, b_enc, scale)
    k, l = check_budget(k, l, W_enc.shape[1], select)
    parts = implementation(resolve_impl(impl, x.device, x.dtype))
    encoder = parts.encoder(x.reshape(-1, x.shape[-1]), W_enc.t(), b_enc, scale=scale)
    found = find_pool(parts, encoder.operands, PoolRule(k, l, score, pool), generator)
    return parts.select(encoder, None if found is None else found.members, Rule(k, select))


def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None = None, impl: str = "auto") -> Tensor:
    """x_hat = c W_dec + b_dec.

    Args:
        codes: [B, F].
        W_dec, b_dec: [F, d], [d] or None.

    Returns:
        [B, d] in W_dec's dtype, differentiable in the codes' values, W_dec and b_dec; equivalent to
        `codes.to_dense() @ W_dec + b_dec`.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if not isinstance(codes, SparseCodes):
        raise TypeError(f"codes={type(codes).__name__}: must be SparseCodes")
    if not isinstance(W_dec, Tensor) or W_dec.dim() != 2 or W_dec.shape[0] != codes.shape[1]:
        raise ValueError(f"W_dec={describe(W_dec)}: must be a tensor of shape [{codes.shape[1]}, d_in]")
    if codes.device != W_dec.device:
        raise ValueError(f"mixed devices: codes {codes.device}, W_dec {W_dec.device}; all must share one device")
    if b_dec is not None:
        if not isinstance(b_dec, Tensor) or b_dec.shape != W_dec.shape[1:]:
            raise ValueError(f"b_dec={describe(b_dec)}: must be a tensor of shape [{W_dec.shape[1]}]")
        check_same(W_dec=W_dec, b_dec=b_dec)
    codes.check_listed()
    parts = implementation(resolve_impl(impl, W_dec.device, W_dec.dtype))
    return parts.decode(codes, W_dec, b_dec).to(W_dec.dtype)

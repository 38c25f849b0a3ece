"""From tokens to active features: how tokens are normed first, as SAELens does, and what each rule asks of an
implementation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codes import SparseCodes
from ..impl.encoder import Encoder, LateTokens
from ..impl.gate import Gate
from ..impl.hints import Rule, ThresholdHints
from ..impl.interface import Implementation
from ..impl.torch.screen import FOR_THRESHOLDS
from .config import InferenceConfig

LAYER_NORM_EPS = 1e-5


class NormedTokens(NamedTuple):
    """x: [B, d], normed. factor, shift: [B, 1] or None; a reconstruction times `factor` plus `shift` is in the units
    that x came in."""

    x: Tensor
    factor: Tensor | None = None
    shift: Tensor | None = None

    def undo(self, x_hat: Tensor) -> Tensor:
        """A reconstruction [B, d] in the units of the tokens."""
        if self.factor is not None:
            x_hat = x_hat * self.factor
        return x_hat if self.shift is None else x_hat + self.shift


def norm_tokens(x: Tensor, normalize: str) -> NormedTokens:
    """x [B, d], differentiable.

    "layer_norm": (x - mean) / (std + 1e-5) with the std of d - 1 degrees of freedom. "constant_norm": x times
    sqrt(d) / ||x||; a token of zeros stays one.
    """
    if normalize == "layer_norm":
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        std = centred.std(1, keepdim=True) if x.shape[1] > 1 and len(x) else torch.zeros_like(mean)
        return NormedTokens(centred / (std + LAYER_NORM_EPS), std, mean)
    if normalize == "constant_norm":
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        root = x.shape[1] ** 0.5
        return NormedTokens(x * (root / torch.where(norms > 0, norms, 1)), norms / root)
    return NormedTokens(x)


class TokensToEncode(NamedTuple):
    """An encoder of some or all features, and which of its activations are active but for the k largest of "topk".

    threshold: 0-dim or [F]. gate: of "gated".
    """

    encoder: Encoder
    threshold: Tensor
    gate: Gate | None


def tokens_to_encode(
    parts: Implementation,
    cfg: InferenceConfig,
    tensors: dict[str, Tensor],
    x: Tensor,
    scale: Tensor | None,
    features: Tensor | None = None,
    late: LateTokens | None = None,
) -> TokensToEncode:
    """Of x [B, d_in], normed and centred.

    Args:
        scale: [F] or [P], the norms of the decoder rows where activations are multiplied by them.
        features: int64 [P], whose rows alone are read; None for all.
        late: how x is normed and centred where that has not been done; for a search of the PyTorch form.
    """

    def rows(t: Tensor) -> Tensor:
        return t if features is None else t.index_select(0, features)

    W = rows(tensors["W_enc"].t())
    how: dict[str, Any] = {} if late is None else {"late": late}
    how["screen"] = FOR_THRESHOLDS if cfg.screen == "auto" and cfg.rule != "topk" else cfg.screen
    if cfg.rule == "gated":
        gain, shift = rows(tensors["r_mag"]).exp(), rows(tensors["b_mag"])
        if scale is not None:
            gain, shift = gain * scale, shift * scale
        b_gate = rows(tensors["b_gate"])
        encoder = parts.encoder(x, W, torch.zeros_like(b_gate), **how)
        return TokensToEncode(encoder, b_gate.new_zeros(()), Gate(b_gate, gain, shift))
    b = rows(tensors["b_enc"])
    threshold = tensors.get("threshold", b.new_zeros(()))
    encoder = parts.encoder(x, W, b, scale=scale, **how)
    return TokensToEncode(encoder, rows(threshold) if threshold.dim() else threshold, None)


def active_codes(parts: Implementation, k: int | None, tokens: TokensToEncode, hints: ThresholdHints) -> SparseCodes:
    """The active features of each token; k of "topk"."""
    if k is not None:
        return parts.select(tokens.encoder, None, Rule(k, "token"), hints)
    return parts.above_threshold(*tokens)


def active_dense(parts: Implementation, k: int | None, tokens: TokensToEncode, hints: ThresholdHints) -> Tensor:
    """The same, dense [B, F]."""
    if k is not None:
        return active_codes(parts, k, tokens, hints).to_dense()
    return parts.dense_above_threshold(*tokens)

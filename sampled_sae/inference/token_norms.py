"""What an SAE does to each token before it encodes it, and how a reconstruction gets back: as SAELens does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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

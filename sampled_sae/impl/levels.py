"""What a Matryoshka SAE's levels have in common: which of them a feature belongs to, and their errors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..support.once_differentiable import once_differentiable


def level_of(features: Tensor, groups: Sequence[int]) -> Tensor:
    """Of features [n], in their dtype, 0 to G - 1; G - 1 for what is in none. Nothing is copied to a device for it.

    Equivalent to `torch.bucketize(features, torch.tensor(groups[:-1]), right=True)`.
    """
    level = torch.zeros_like(features)
    for size in groups[:-1]:
        level += features >= size
    return level


def level_errors(x: Tensor, levels: Tensor) -> Tensor:
    """||x_i - level_im||^2 of each token and level, [B, G], from x [B, d] and levels [B, G, d].

    Equivalent to `(levels - x[:, None]).square().sum(-1)`, in fewer passes over what has G times the size of x.
    """
    return LevelErrors.apply(x, levels)


class LevelErrors(torch.autograd.Function):
    """See `level_errors`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor) -> Tensor:
        difference = levels - x[:, None].to(levels.dtype)
        errors = torch.linalg.vector_norm(difference, dim=-1).square_()
        ctx.save_for_backward(difference, errors)
        ctx.dtype = x.dtype
        return errors

    @staticmethod
    @partial(once_differentiable, also_of=lambda ctx: ctx.saved_tensors[1:])
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        difference, _ = ctx.saved_tensors
        d_levels = difference * (2 * grad)[..., None]
        return -d_levels.sum(1).to(ctx.dtype) if ctx.needs_input_grad[0] else None, d_levels

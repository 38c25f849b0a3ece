"""Initial values that come from data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def geometric_median(
    x: Tensor,
    iterations: int = 100,
    tolerance: float = 1e-6,
    total: Callable[[Tensor], Tensor] = lambda t: t.sum(0),
    greatest: Callable[[Tensor], Tensor] = torch.amax,
) -> Tensor:
    """The point of least summed distance to the rows of x [B, d], [d], by Weiszfeld's iteration.

    Unlike the mean it is not carried off by a few outlying tokens. Stops when a step is below `tolerance`
    times the point's distance scale.

    Args:
        total, greatest: the sum over tokens of [B, ...], the largest of [B]; of all processes where there are several.
    """
    x = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
    n_tokens = total(x.new_ones(len(x)))
    point = total(x) / n_tokens
    for _ in range(iterations):
        distance = torch.linalg.vector_norm(x - point, dim=1)
        weight = 1 / distance.clamp_min(torch.finfo(x.dtype).eps * (1 + greatest(distance)))
        moved = total(weight[:, None] * x) / total(weight)
        step = torch.linalg.vector_norm(moved - point)
        point = moved
        if step <= tolerance * total(distance) / n_tokens:
            break
    return point

"""Initial values that come from data."""

from __future__ import annotations

import torch
from torch import Tensor


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point of least summed distance to the rows of x [B, d], [d], by Weiszfeld's iteration.

    Unlike the mean it is not carried off by a few outlying tokens. Stops when a step is below `tolerance`
    times the point's distance scale.
    """
    x = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
    point = x.mean(0)
    for _ in range(iterations):
        distance = torch.linalg.vector_norm(x - point, dim=1)
        weight = 1 / distance.clamp_min(torch.finfo(x.dtype).eps * (1 + distance.max()))
        moved = (weight[:, None] * x).sum(0) / weight.sum()
        step = torch.linalg.vector_norm(moved - point)
        point = moved
        if step <= tolerance * distance.mean():
            break
    return point

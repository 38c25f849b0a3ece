"""Exact "largest n" with a tie rule."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def nth_largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest (n >= 1) of a flat tensor, 0-dim; equivalent to `values.sort(descending=True)[0][n-1]`.

    On a CPU by numpy's vectorised partition, which is 2x faster than kthvalue.
    """
    rank = values.numel() - n
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        return values.new_tensor(np.partition(values.detach().numpy(), rank)[rank])
    return values.detach().kthvalue(rank + 1).values


def nth_largest_of_rows(values: Tensor, n: int) -> Tensor:
    """The n-th largest (1 <= n <= P) of each row of [B, P], [B]; equivalent to `values.topk(n, 1).values[:, -1]`."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        rank = values.shape[1] - n
        return torch.from_numpy(np.partition(values.detach().numpy(), rank, axis=1)[:, rank].copy())
    return values.detach().topk(n, dim=1, sorted=False).values.amin(1)


def largest_mask(values: Tensor, n: int) -> Tensor:
    """Mask of the n largest of a flat tensor; among equals the lower index goes first."""
    if n >= values.numel():
        return torch.ones_like(values, dtype=torch.bool)
    if n == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    cut = nth_largest(values, n)
    mask = values > cut
    ties = (values == cut).nonzero().squeeze(1)
    mask[ties[: n - int(mask.sum())]] = True
    return mask


def largest_mask_of_rows(a: Tensor, k: int) -> Tensor:
    """Mask of the k largest of each row of [B, P]; among equals the lower column goes first."""
    if k >= a.shape[1]:
        return torch.ones_like(a, dtype=torch.bool)
    cut = nth_largest_of_rows(a, k)[:, None]
    within = a >= cut
    if int(within.count_nonzero()) == k * a.shape[0]:
        return within
    above = a > cut
    tied = within & ~above
    return above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))

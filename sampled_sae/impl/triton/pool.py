"""The candidate pool without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.batch_topk import largest_indices
from ..ranking import gumbel_keys


@torch.library.custom_op("sampled_sae::top_pool", mutates_args=())
def top_pool(scores: Tensor, size: int) -> Tensor:
    """The `size` highest of scores [F], ties to the lower index: int64 [size], ascending."""
    return largest_indices(scores, size)


@top_pool.register_fake
def _(scores: Tensor, size: int) -> Tensor:
    return scores.new_empty(size, dtype=torch.int64)


def candidate_pool(scores: Tensor, size: int, pool: str = "top", generator: torch.Generator | None = None) -> Tensor:
    """As the torch form's; `size` is at most F."""
    if pool == "top":
        return top_pool(scores, size)
    return largest_keys(gumbel_keys(scores, generator), size)


def largest_keys(keys: Tensor, size: int) -> Tensor:
    """The `size` highest of keys [F] of any sign, ties to the lower index: int64 [size], ascending."""
    return torch.sort(keys, descending=True, stable=True).indices[:size].sort().values

"""The Triton kernels as `torch.library` operators `sampled_sae::*`, with shapes for tracing and with gradients.

Here those without a gradient; blocks and entries are in files of their own. Nothing reads a value back to the
host: sizes follow from the shapes and the budget alone, so a step can be compiled whole and captured in a CUDA
graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.batch_topk import largest_indices
from .scores import STATISTICS
from .scores import column_statistics as _column_statistics


@torch.library.custom_op("sampled_sae::column_statistics", mutates_args=())
def column_statistics(x: Tensor, W: Tensor, b: Tensor, score: str, scale: Tensor | None) -> Tensor:
    """Sums over the tokens of relu(x W^T + b) * scale, fp32 [S, F], from which `finish_scores` makes scores."""
    return _column_statistics(x, W, b, score, scale)


@column_statistics.register_fake
def _(x: Tensor, W: Tensor, b: Tensor, score: str, scale: Tensor | None) -> Tensor:
    return x.new_empty(STATISTICS[score], W.shape[0], dtype=torch.float32)


@torch.library.custom_op("sampled_sae::top_pool", mutates_args=())
def top_pool(scores: Tensor, size: int) -> Tensor:
    """The `size` highest of scores [F], ties to the lower index: int64 [size], ascending."""
    return largest_indices(scores, size)


@top_pool.register_fake
def _(scores: Tensor, size: int) -> Tensor:
    return scores.new_empty(size, dtype=torch.int64)


def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """The gradient of a gradient operator."""
    raise RuntimeError(
        "sampled_sae: the Triton operators have no second derivative; use impl='reference' for double backward"
    )

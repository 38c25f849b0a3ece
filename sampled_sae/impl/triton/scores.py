"""Column statistics on a GPU: fused into the product, or chunk by chunk behind cuBLAS's."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.arguments import check_encoder
from ...kernels.chunk_scores import chunk_statistics
from ...kernels.column_scores import STATISTICS, statistics_of
from ...kernels.column_scores import column_statistics as fused_statistics
from ...kernels.configs import architecture, largest_fused_d
from .products import encoder_chunks

__all__ = ["STATISTICS", "column_statistics"]


def column_statistics(x: Tensor, W: Tensor, b: Tensor | None, score: str, scale: Tensor | None = None) -> Tensor:
    """Sums over the tokens from which the score follows, fp32 [S, F]; adding those of two batches gives those of both.

    Args:
        x: [B, d] fp32, bf16 or fp16, centred.
        W, b, scale: [F, d] in x's dtype; [F] or None.

    The fused kernel saves writing and reading [B, F] and multiplies slower than cuBLAS: it wins up to some d. It
    knows no TF32: whoever allows that gets cuBLAS.
    """
    tf32 = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    if not tf32 and (x.ndim != 2 or x.shape[1] <= largest_fused_d(architecture(x.device), x.dtype)):
        return fused_statistics(x, W, b, score, scale)
    return chunked_statistics(x, W, b, score, scale)


def chunked_statistics(x: Tensor, W: Tensor, b: Tensor | None, score: str, scale: Tensor | None = None) -> Tensor:
    """The same, by cuBLAS's product of one chunk of features after another and one pass over each."""
    check_encoder(x, W, b, scale)
    statistics = torch.empty(statistics_of(score), W.shape[0], dtype=torch.float32, device=x.device)
    for chunk in encoder_chunks(x, W, b, scale, None):
        statistics[:, chunk.at] = chunk_statistics(chunk.z, chunk.b, chunk.scale, score)
    return statistics

"""Column statistics on a GPU: fused into the product, or chunk by chunk behind cuBLAS's."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.arguments import check_encoder
from ...kernels.chunk_scores import chunk_partials, folded, write_partials_
from ...kernels.column_scores import STATISTICS, is_fused
from ...kernels.column_scores import column_statistics as fused_statistics
from ...support.float32_products import tf32_allowed
from ..encoder import Operands
from ..torch.scores import finish_scores
from .products import encoder_chunks


def column_scores(operands: Operands, score: str) -> Tensor:
    """[F], of every feature; no gradient."""
    x, W, b, scale, *_ = operands
    return finish_scores(column_statistics(x, W, b, score, scale), score)


@torch.library.custom_op("sampled_sae::column_statistics", mutates_args=())
def column_statistics(x: Tensor, W: Tensor, b: Tensor, score: str, scale: Tensor | None) -> Tensor:
    """Sums over the tokens of a = relu(x W^T + b) * scale, fp32 [S, F], from which the score follows.

    The sums of two batches add up to those of both. x [B, d] and W [F, d] are fp32, bf16 or fp16, x is centred.

    The fused kernel saves writing and reading [B, F] and multiplies slower than cuBLAS: it wins up to some d, with
    tensor descriptors to a larger one. It knows no TF32: whoever allows that gets cuBLAS.
    """
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    if not tf32 and (x.ndim != 2 or W.ndim != 2 or is_fused(x, W)):
        return fused_statistics(x, W, b, score, scale)
    return chunked_statistics(Operands(x, W, b, scale), score)


@column_statistics.register_fake
def _(x: Tensor, W: Tensor, b: Tensor, score: str, scale: Tensor | None) -> Tensor:
    return x.new_empty(STATISTICS[score], W.shape[0], dtype=torch.float32)


def chunked_statistics(operands: Operands, score: str) -> Tensor:
    """The same, by cuBLAS's product of one chunk of features after another and one pass over each."""
    x, W, b, scale, *_ = operands
    check_encoder(x, W, b, scale)
    partials = chunk_partials(operands.n_tokens, operands.n_features, score, x.device)
    for chunk in encoder_chunks(operands):
        write_partials_(chunk.z, chunk.b, chunk.scale, score, partials[:, :, chunk.at])
    return folded(partials)

"""The score kernel's product without its epilogue, for the ratio of Triton's products to cuBLAS's.

FLOPs: 2BdF. Written as the product itself, [F, B] in the operands' dtype, or as bare sums over the tokens of a tile,
the least that keeps the compiler from dropping the main loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import product_tile, tile_of_block
from sampled_sae.kernels.configs import architecture, column_scores_config, launch
from sampled_sae.kernels.interpreter import rounded


@triton.jit(do_not_specialize=["B"])
def plain_product_kernel(
    x,
    W,
    out,
    B,
    F,
    stride_x,
    stride_W,
    D: tl.constexpr,
    WRITE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_f, i_t = tile_of_block(tl.program_id(0), tl.cdiv(F, BM), tl.cdiv(B, BN), GROUP)
    o_f = i_f * BM + tl.arange(0, BM)  # [BM]
    o_t = i_t * BN + tl.arange(0, BN)  # [BN]
    b_f = tl.minimum(o_f, F - 1)  # [BM]
    b_z = product_tile(x, W, tl.minimum(o_t, B - 1), b_f, stride_x, stride_W, D, BM, BN, BD)  # [BM, BN]
    if WRITE:
        p_out = out + o_f.to(tl.int64)[:, None] * B + o_t[None, :]  # [BM, BN]
        tl.store(p_out, rounded(b_z, out.dtype.element_ty), mask=(o_f < F)[:, None] & (o_t < B)[None, :])
    else:
        b_z = tl.where((o_t < B)[None, :], b_z, 0.0)  # [BM, BN]
        tl.store(out + i_t.to(tl.int64) * F + o_f, tl.sum(b_z, axis=1), mask=o_f < F)


def plain_product(x: torch.Tensor, W: torch.Tensor, write: bool) -> torch.Tensor:
    """W x^T, [F, B] in x's dtype, or its sums over the tokens of each tile, fp32 [tiles, F]."""
    (B, D), F = x.shape, W.shape[0]
    config = column_scores_config(architecture(x.device), x.dtype, D)
    T = triton.cdiv(B, config.kwargs["BN"])
    out = x.new_empty(F, B) if write else x.new_empty(T, F, dtype=torch.float32)
    launch(
        plain_product_kernel,
        config,
        lambda meta: (triton.cdiv(F, meta["BM"]) * T,),
        (x, W, out, B, F, x.stride(0), W.stride(0)),
        D=D,
        WRITE=write,
    )
    return out

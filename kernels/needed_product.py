"""The product of a chunk of features in fp32, where a flag on the device says that it is needed.

2BCd FLOPs, or a launch whose programs leave at once: what a cheaper look at a batch has left open is computed in full
without a word from the host. Programs are as many as the GPU holds and walk over the tiles.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import product_tile, tile_of_block
from sampled_sae.kernels.arguments import check_encoder, check_vector, contiguous_rows
from sampled_sae.kernels.configs import architecture, column_scores_config, launch, resident_programs


@triton.jit(do_not_specialize=["B", "C", "first"])
def needed_product_kernel(
    needed,
    x,
    W,
    features,
    z,
    B,
    C,
    first,
    stride_x,
    stride_W,
    D: tl.constexpr,
    HAS_FEATURES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    T = tl.cdiv(B, BN)
    n_tiles = tl.cdiv(C, BM) * T
    if tl.load(needed) == 0:
        n_tiles = 0
    i = tl.program_id(0)
    while i < n_tiles:
        i_f, i_t = tile_of_block(i, tl.cdiv(C, BM), T, GROUP)
        o_f = i_f * BM + tl.arange(0, BM)  # [BM]
        o_t = i_t * BN + tl.arange(0, BN)  # [BN]
        b_f = tl.minimum(o_f, C - 1)  # [BM]
        if HAS_FEATURES:
            b_f = tl.load(features + b_f)  # [BM]
        else:
            b_f += first  # [BM]
        b_z = product_tile(x, W, tl.minimum(o_t, B - 1), b_f, stride_x, stride_W, D, BM, BN, BD)  # [BM, BN]
        p_z = z + o_t.to(tl.int64)[None, :] * C + o_f[:, None]  # [BM, BN]
        tl.store(p_z, b_z, mask=(o_f < C)[:, None] & (o_t < B)[None, :])
        i += tl.num_programs(0)


def product_if_(
    needed: torch.Tensor, x: torch.Tensor, W: torch.Tensor, features: torch.Tensor | int, z: torch.Tensor
) -> None:
    """z = x @ W[features].T, fp32 [B, C], contiguous, where `needed` (int64 [1]) is not 0; else z stays as it is.

    features: int64 [C], or the first of C in a row. x [B, d] and W [F, d] are of one dtype; fp32 is multiplied in IEEE.
    """
    check_encoder(x, W, None, None)
    check_vector("needed", needed, torch.int64, 1)
    B, D = x.shape
    if z.ndim != 2 or z.dtype != torch.float32 or len(z) != B or not z.is_contiguous():
        raise ValueError(f"z must be contiguous fp32 [{B}, C], got {z.dtype} {list(z.shape)}")
    C = z.shape[1]
    has_features = isinstance(features, torch.Tensor)
    if has_features:
        check_vector("features", features, torch.int64, C)
    elif not 0 <= features <= len(W) - C:
        raise ValueError(f"features from {features} on: W has {len(W)}, {C} are asked for")
    if z.numel() == 0:
        return
    x = contiguous_rows(x)
    config = column_scores_config(architecture(x.device), x.dtype, D)
    tiles = triton.cdiv(C, config.kwargs["BM"]) * triton.cdiv(B, config.kwargs["BN"])
    listed, first = (features, 0) if has_features else (None, features)
    launch(
        needed_product_kernel,
        config,
        (min(resident_programs(x.device), tiles),),
        (needed, x, W, listed, z, B, C, first, x.stride(0), W.stride(0)),
        D=D,
        HAS_FEATURES=has_features,
    )

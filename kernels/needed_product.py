"""The product of a chunk of features in fp32, where a flag on the device says that it is needed.

Or what of (z + b) * scale lies above a floor for each feature, and 0 in the place of all else. 2BCd FLOPs, or a launch
whose programs leave at once: what a cheaper look at a batch has left open is computed in full without a word from the
host. Programs are as many as the GPU holds and walk over the tiles.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import before_relu, product_tile, tile_of_block
from sampled_sae.kernels.arguments import check_encoder, check_products, check_vector, contiguous_rows, listed_or_first
from sampled_sae.kernels.configs import architecture, given, launch, needed_product_config, resident_programs


@triton.jit(do_not_specialize=["B", "C", "first"])
def needed_product_kernel(
    needed,
    x,
    W,
    features,
    b,
    scale,
    floors,
    z,
    B,
    C,
    first,
    stride_x,
    stride_W,
    stride_z,
    D: tl.constexpr,
    HAS_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FLOORS: tl.constexpr,
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
        m_f = (o_f < C)[:, None]  # [BM, 1]
        b_z = before_relu(b_z, b, scale, o_f[:, None], m_f, HAS_BIAS, HAS_SCALE)  # [BM, BN]
        if HAS_FLOORS:
            b_z = tl.where(b_z > tl.load(floors + o_f[:, None], mask=m_f, other=0.0), b_z, 0.0)  # [BM, BN]
        p_z = z + o_t.to(tl.int64)[None, :] * stride_z + o_f[:, None]  # [BM, BN]
        tl.store(p_z, b_z, mask=m_f & (o_t < B)[None, :])
        i += tl.num_programs(0)


def product_if_(
    needed: torch.Tensor,
    x: torch.Tensor,
    W: torch.Tensor,
    features: torch.Tensor | int,
    z: torch.Tensor,
    b: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    floors: torch.Tensor | None = None,
) -> None:
    """z = (x @ W[features].T + b) * scale, fp32 [B, C], where `needed` (int64 [1]) is not 0; else z stays as it is.

    features: int64 [C], or the first of C in a row. x [B, d] and W [F, d] are of one dtype; fp32 is multiplied in IEEE.
    b and scale are [C]. With `floors` fp32 [C] z is 0 where it does not exceed them: `z * (z > floors)`.
    """
    check_encoder(x, W, None, None)
    check_vector("needed", needed, torch.int64, 1)
    B, D = x.shape
    check_products(z, b, scale)
    C = z.shape[1]
    if len(z) != B:
        raise ValueError(f"z must have a row for each of {B} tokens, got {list(z.shape)}")
    if floors is not None:
        check_vector("floors", floors, torch.float32, C)
    listed, first = listed_or_first(features, C)
    if listed is None and not 0 <= first <= len(W) - C:
        raise ValueError(f"features from {features} on: W has {len(W)}, {C} are asked for")
    if z.numel() == 0:
        return
    x = contiguous_rows(x)
    config = needed_product_config(architecture(x.device), x.dtype)
    tiles = triton.cdiv(C, config.kwargs["BM"]) * triton.cdiv(B, config.kwargs["BN"])
    launch(
        needed_product_kernel,
        config,
        (min(resident_programs(x.device), tiles),),
        (needed, x, W, listed, b, scale, floors, z, B, C, first, x.stride(0), W.stride(0), z.stride(0)),
        D=D,
        **given(features=listed, bias=b, scale=scale, floors=floors),
    )

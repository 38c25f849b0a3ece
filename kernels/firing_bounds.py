"""How many activations of each column are surely above zero, and how many may be, seen in bfloat16.

With x^ = x + dx and w^ = w + dw an entry is off by no more than ||x^_i|| ||dw_j|| + ||dx_i|| ||w_j|| and what its sums
are rounded by, which each tile of the product adds and subtracts before it counts. FLOPs: 2BdF. Bytes: as
column_scores.py.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import product_tile, tile_of_block
from sampled_sae.kernels.arguments import check_encoder, check_vector, contiguous_rows
from sampled_sae.kernels.column_scores import fold_partials
from sampled_sae.kernels.configs import FIRING, launch, of_family
from sampled_sae.kernels.rounded_rows import LEAST, MARGIN, SUMS


@triton.jit(do_not_specialize=["B"])
def firing_partials_kernel(
    x,
    W,
    b,
    x_norms,
    x_errors,
    W_norms,
    W_errors,
    partials,
    B,
    F,
    stride_x,
    stride_W,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    T = tl.cdiv(B, BN)
    i_f, i_t = tile_of_block(tl.program_id(0), tl.cdiv(F, BM), T, GROUP)
    o_f = i_f * BM + tl.arange(0, BM)  # [BM]
    o_t = i_t * BN + tl.arange(0, BN)  # [BN]
    m_f = o_f < F  # [BM]
    b_f = tl.minimum(o_f, F - 1)  # [BM]
    b_t = tl.minimum(o_t, B - 1)  # [BN]
    b_z = product_tile(x, W, b_t, b_f, stride_x, stride_W, D, BM, BN, BD)  # [BM, BN]
    ROUNDED: tl.constexpr = SUMS * D
    b_n = tl.load(W_norms + b_f)  # [BM]
    b_e = tl.load(W_errors + b_f)  # [BM]
    b_e += (b_n + b_e) * ROUNDED
    b_x = tl.load(x_errors + b_t)  # [BN]
    b_off = (tl.load(x_norms + b_t) + b_x)[None, :] * b_e[:, None] + b_x[None, :] * b_n[:, None]  # [BM, BN]
    if HAS_BIAS:
        b_b = tl.load(b + b_f).to(tl.float32)[:, None]  # [BM, 1]
        b_z += b_b
        b_off += tl.abs(b_b) * SUMS
    b_off = (b_off + LEAST) * MARGIN
    m_t = (o_t < B)[None, :]  # [1, BN]
    m_sure = m_t & (b_z > b_off)  # [BM, BN]
    # where a bound is not a number the entry may fire
    m_not = b_z <= -b_off  # [BM, BN]
    p_s = partials + i_t.to(tl.int64) * F + o_f  # [BM]
    tl.store(p_s, tl.sum(m_sure.to(tl.float32), axis=1), mask=m_f)
    tl.store(p_s + T.to(tl.int64) * F, tl.sum((m_t & (m_not == 0)).to(tl.float32), axis=1), mask=m_f)


def firing_bounds(
    x: torch.Tensor,
    x_norms: torch.Tensor,
    x_errors: torch.Tensor,
    W: torch.Tensor,
    W_norms: torch.Tensor,
    W_errors: torch.Tensor,
    b: torch.Tensor | None,
) -> torch.Tensor:
    """fp32 [2, F]: how many entries of x W^T + b were above zero before x [B, d] and W [F, d] were rounded, of each
    feature at least and at most; the arguments beside b are what `rounded_rows` gave."""
    if x.dtype != torch.bfloat16:
        raise ValueError(f"x must be bf16, got {x.dtype}")
    check_encoder(x, W, b, None)
    (B, D), F = x.shape, W.shape[0]
    for name, vector, length in (("x_norms", x_norms, B), ("x_errors", x_errors, B)):
        check_vector(name, vector, torch.float32, length)
    for name, vector in (("W_norms", W_norms), ("W_errors", W_errors)):
        check_vector(name, vector, torch.float32, F)
    if B == 0 or F == 0:
        return torch.zeros(2, F, dtype=torch.float32, device=x.device)
    x = contiguous_rows(x)
    config = of_family(FIRING, x.device)
    T = triton.cdiv(B, config.kwargs["BN"])
    partials = torch.empty(2 * T * F, dtype=torch.float32, device=x.device)
    launch(
        firing_partials_kernel,
        config,
        lambda meta: (triton.cdiv(F, meta["BM"]) * T,),
        (x, W, b, x_norms, x_errors, W_norms, W_errors, partials, B, F, x.stride(0), W.stride(0)),
        D=D,
        HAS_BIAS=b is not None,
    )
    return fold_partials(partials, 2, T, F)

"""Rows rounded to bfloat16, their norms, and the norms of what rounding changed, in one pass.

Bytes: a row read in fp32 and written in bf16, 6 an element; a few FLOPs, so bound by memory. Norms are bounds from
above: sums of squares are rounded themselves, and a square below 2^-126 may be lost.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.arguments import check_vector, rows_are_contiguous
from sampled_sae.kernels.configs import ROUNDED_ROWS, launch, of_family
from sampled_sae.kernels.interpreter import rounded

# what the sum of up to 2^17 squares and its root are rounded by, at most
MARGIN = tl.constexpr(1.01)
# What a sum of d products moves by, at most, for each of them and for norms of 1 of both factors: 2^-23 where matrix
# units cut off what does not fit in fp32, and that twice for safety.
SUMS = tl.constexpr(2.0**-22)
# the square of anything smaller may be lost
LEAST = tl.constexpr(2.0**-62)


@triton.jit(do_not_specialize=["N"])
def round_rows_kernel(
    rows,
    factor,
    values,
    norms,
    errors,
    N,
    stride,
    D: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    o_d = tl.arange(0, BD)  # [BD]
    m_r = o_r < N  # [BR]
    b_n = tl.zeros([BR, BD], dtype=tl.float32)  # [BR, BD]
    b_e = tl.zeros([BR, BD], dtype=tl.float32)  # [BR, BD]
    for i in range(0, D, BD):
        m_v = m_r[:, None] & (o_d[None, :] < D - i)  # [BR, BD]
        b_v = tl.load(rows + o_r[:, None] * stride + i + o_d[None, :], mask=m_v, other=0.0)  # [BR, BD]
        if HAS_FACTOR:
            b_v *= tl.load(factor)
        b_low = rounded(b_v, tl.bfloat16)  # [BR, BD]
        tl.store(values + o_r[:, None] * D + i + o_d[None, :], b_low, mask=m_v)
        b_r = b_v - b_low.to(tl.float32)  # [BR, BD]
        b_n += b_v * b_v
        b_e += b_r * b_r
    LEAST_NORM: tl.constexpr = LEAST * D
    tl.store(norms + o_r, tl.sqrt(tl.sum(b_n, axis=1)) * MARGIN + LEAST_NORM, mask=m_r)
    tl.store(errors + o_r, tl.sqrt(tl.sum(b_e, axis=1)) * MARGIN + LEAST_NORM, mask=m_r)


def rounded_rows(
    rows: torch.Tensor, factor: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 [N, d] in bf16, contiguous, and two bounds from above, fp32 [N]; `factor` fp32 [1] multiplies rows first.

    Equivalent to `low = rows.bfloat16(); return low, rows.norm(dim=1), (rows - low).norm(dim=1)`, whose norms the
    bounds exceed by about a hundredth. Where a row holds NaN or inf, or its square leaves fp32, a bound is not finite.
    """
    if rows.ndim != 2 or rows.dtype != torch.float32 or not rows_are_contiguous(rows):
        raise ValueError(f"rows must be fp32 [N, d] with contiguous rows, got {rows.dtype} {list(rows.shape)}")
    if factor is not None:
        check_vector("factor", factor, torch.float32, 1)
    N, D = rows.shape
    values = torch.empty(N, D, dtype=torch.bfloat16, device=rows.device)
    norms, errors = (torch.empty(N, dtype=torch.float32, device=rows.device) for _ in range(2))
    if N == 0:
        return values, norms, errors
    launch(
        round_rows_kernel,
        of_family(ROUNDED_ROWS, rows.device),
        lambda meta: (triton.cdiv(N, meta["BR"]),),
        (rows, factor, values, norms, errors, N, rows.stride(0)),
        D=D,
        HAS_FACTOR=factor is not None,
    )
    return values, norms, errors

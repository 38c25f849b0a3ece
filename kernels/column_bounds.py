"""Between what and what the squared norms of columns of a = relu(x W^T + b) * scale lie, from those seen in bfloat16.

The norm of a column moves by no more than the norm of its error, ||x^||_2 ||dw_j|| + ||dx||_2 ||w_j|| and what sums are
rounded by. Bytes: a few numbers a feature.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.arguments import check_features, check_vector
from sampled_sae.kernels.configs import SPECTRAL, given, launch
from sampled_sae.kernels.rounded_rows import LEAST, MARGIN, SUMS

# of the norm that was seen: its sums in tiles, whose depth is below this and grows by one for each 1,024 tokens
DEPTH = tl.constexpr(520.0)
UNIT = tl.constexpr(2.0**-24)
# of a square that is written
SQUARE = tl.constexpr(2.0**-20)
TINY = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=["B"])
def column_bounds_kernel(
    sums,
    norms,
    errors,
    b,
    scale,
    of_x,
    of_changes,
    low,
    high,
    B,
    F,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_f = o_f < F  # [BLOCK]
    ROUNDED: tl.constexpr = SUMS * D
    b_n = tl.load(norms + o_f, mask=m_f, other=0.0)  # [BLOCK]
    b_e = tl.load(errors + o_f, mask=m_f, other=0.0)  # [BLOCK]
    b_d = b_e * tl.load(of_x) + b_n * tl.load(of_changes)  # [BLOCK]
    b_d += (b_n + b_e) * (tl.load(of_x + 1) * ROUNDED)
    tokens = B.to(tl.float32)
    root = tl.sqrt(tokens)
    if HAS_BIAS:
        b_d += tl.abs(tl.load(b + o_f, mask=m_f, other=0.0).to(tl.float32)) * (root * SUMS)
    if HAS_SCALE:
        b_d *= tl.load(scale + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_s = tl.sqrt(tl.load(sums + o_f, mask=m_f, other=0.0))  # [BLOCK]
    b_d += b_s * ((tokens / 1024 + DEPTH) * UNIT)
    # squares of what is smaller are lost
    b_d = (b_d + root * LEAST) * MARGIN
    b_l = tl.where(b_s > b_d, b_s - b_d, 0.0)  # [BLOCK]
    b_h = b_s + b_d  # [BLOCK]
    b_h = b_h * b_h * (1 + SQUARE) + TINY
    # not NaN, whose bits on a GPU have no successor: they are told apart by one more
    b_h = tl.where(b_h >= 0, b_h, float("inf"))  # [BLOCK]
    tl.store(low + o_f, b_l * b_l * (1 - SQUARE), mask=m_f)
    tl.store(high + o_f, b_h, mask=m_f)


def column_bounds(
    sums: torch.Tensor,
    norms: torch.Tensor,
    errors: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    of_x: torch.Tensor,
    of_changes: torch.Tensor,
    n_tokens: int,
    d: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(least, greatest) sum of squares of each column of activations, fp32 [F] each; 0 and infinity where nothing is
    known.

    Args:
        sums: fp32 [F], the sums of squares that `column_statistics` found for the rounded operands.
        norms, errors: fp32 [F], what `rounded_rows` gave for W [F, d].
        b, scale: [F] or None; scale is positive.
        of_x, of_changes: what `spectral_bound` gave for the rounded x and for what rounding changed of it.
    """
    F = len(sums)
    for name, vector in (("sums", sums), ("norms", norms), ("errors", errors)):
        check_vector(name, vector, torch.float32, F)
    for name, vector in (("of_x", of_x), ("of_changes", of_changes)):
        check_vector(name, vector, torch.float32, 2)
    check_features(b, scale, F)
    low, high = (torch.empty(F, dtype=torch.float32, device=sums.device) for _ in range(2))
    launch(
        column_bounds_kernel,
        SPECTRAL,
        lambda meta: (triton.cdiv(F, meta["BLOCK"]),),
        (sums, norms, errors, b, scale, of_x, of_changes, low, high, n_tokens, F),
        D=d,
        **given(bias=b, scale=scale),
    )
    return low, high

"""Products of kept entries with rows of W [F, d]: their sums for each token, and their dots with a row of the token.

Each entry reads its row of W once, d * itemsize bytes, for 2d FLOPs: bound by memory. The sums (decode, gradient of
x) are those of `segment_sum.py` over the entries of each token. The dots (gradient of the values) go by entries,
not tokens, so every program has the same work; the token's row, which neighbours share, comes from L1. Each warp
has its own entries: a row is read in whole lines, and its sum never leaves the warp. Where W is larger than L2 a
program has a stripe of d, which all of them read before the next, and sums of stripes are added in a fixed order.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.arguments import check_matrix, check_vector, check_weights, contiguous_rows
from sampled_sae.kernels.column_scores import fold_partials
from sampled_sae.kernels.configs import FITS_L2, architecture, entry_dots_config, launch
from sampled_sae.kernels.segment_sum import sum_segments


@triton.jit
def dots_of_rows(
    left,
    W,
    b_i,
    b_j,
    stride_left,
    stride_W,
    first,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    """left_i . W_j for rows b_i and b_j, int64 [BE], all of which must exist: [BE].

    Over WIDTH columns from `first` on, as far as there are so many: all D of them, or a multiple of BD.
    """
    # what a lane loads at once is summed first: one accumulator for it leaves registers for more warps
    VECTOR: tl.constexpr = 128 // W.dtype.element_ty.primitive_bitwidth
    o_d = first + tl.arange(0, BD)  # [BD]
    p_left = left + b_i[:, None] * stride_left + o_d[None, :]  # [BE, BD]
    p_W = W + b_j[:, None] * stride_W + o_d[None, :]  # [BE, BD]

    b_out = tl.zeros([BE, BD // VECTOR], dtype=tl.float32)  # [BE, BD / VECTOR]
    for i in range(0, WIDTH, BD):
        if D % BD == 0:
            b_left = tl.load(p_left)  # [BE, BD]
            b_W = tl.load(p_W)  # [BE, BD]
        else:
            b_left = tl.load(p_left, mask=o_d[None, :] < D - i, other=0.0)  # [BE, BD]
            b_W = tl.load(p_W, mask=o_d[None, :] < D - i, other=0.0)  # [BE, BD]
        b_t = b_left.to(tl.float32) * b_W.to(tl.float32)  # [BE, BD]
        b_out += tl.sum(tl.reshape(b_t, [BE, BD // VECTOR, VECTOR]), axis=2)  # [BE, BD / VECTOR]
        p_left += BD
        p_W += BD
    return tl.sum(b_out, axis=1)


@triton.jit(do_not_specialize=["B", "n"])
def entry_dots_kernel(
    left,
    W,
    tokens,
    features,
    token_ends,
    out,
    B,
    n,
    stride_left,
    stride_W,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    i_s = tl.program_id(1)
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)  # [BE]
    m_e = o_e < tl.load(token_ends + B)  # [BE]
    # unused slots take the first rows, so loads need no mask
    b_i = tl.load(tokens + o_e, mask=m_e, other=0).to(tl.int64)  # [BE]
    b_j = tl.load(features + o_e, mask=m_e, other=0).to(tl.int64)  # [BE]
    b_out = dots_of_rows(left, W, b_i, b_j, stride_left, stride_W, i_s * WIDTH, D, WIDTH, BE, BD)  # [BE]
    tl.store(out + i_s.to(tl.int64) * n + o_e, tl.where(m_e, b_out, 0.0), mask=o_e < n)


def gather_sum(
    weights: torch.Tensor,
    features: torch.Tensor,
    token_ends: torch.Tensor,
    W: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over each token's entries of weights_ij * W_j, plus bias: fp32 [B, d], no gradient.

    Token i has the entries token_ends[i] to token_ends[i + 1] of weights (fp32 [n]) and features (int32 [n]); what
    comes after token_ends[B] is not read. Equivalent to
    `stack([weights[s:e] @ W[features[s:e]] for s, e in pairwise(token_ends)]) + bias`.
    """
    check_vector("weights", weights, torch.float32)
    check_vector("features", features, torch.int32, len(weights))
    check_vector("token_ends", token_ends, torch.int32)
    check_weights(W)
    D = W.shape[1]
    if bias is not None and (bias.shape != (D,) or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous, [{D}], got {list(bias.shape)}")
    out = torch.empty(len(token_ends) - 1, D, dtype=torch.float32, device=W.device)
    sum_segments(weights, features, None, token_ends, W, bias, None, out, None)
    return out


def entry_dots(
    left: torch.Tensor, W: torch.Tensor, tokens: torch.Tensor, features: torch.Tensor, token_ends: torch.Tensor
) -> torch.Tensor:
    """left_i . W_j at each entry (i, j), 0 at the slots from token_ends[B] on: fp32 [n], no gradient.

    Equivalent to `(left[tokens] * W[features]).sum(1)` over the entries before token_ends[B].
    """
    check_matrix("left", left)
    check_weights(W)
    (B, D), F, n = left.shape, W.shape[0], len(tokens)
    if W.shape[1] != D:
        raise ValueError(f"left [B, d] and W [F, d] expected, got {list(left.shape)} and {list(W.shape)}")
    check_vector("tokens", tokens, torch.int32)
    check_vector("features", features, torch.int32, n)
    check_vector("token_ends", token_ends, torch.int32, B + 1)
    if B == 0 or F == 0:
        return W.new_zeros(n, dtype=torch.float32)
    if n == 0:
        return torch.empty(n, dtype=torch.float32, device=W.device)
    left = contiguous_rows(left)
    config = entry_dots_config(architecture(W.device), W.dtype)
    WIDTH = D if F * D * W.itemsize <= FITS_L2 else min(D, config.kwargs["BD"])
    stripes = 1 if WIDTH == D else triton.cdiv(D, WIDTH)
    partials = torch.empty(stripes * n, dtype=torch.float32, device=W.device)
    launch(
        entry_dots_kernel,
        config,
        lambda meta: (triton.cdiv(n, meta["BE"]), stripes),
        (left, W, tokens, features, token_ends, partials, B, n, left.stride(0), W.stride(0)),
        D=D,
        WIDTH=WIDTH,
    )
    return partials if stripes == 1 else fold_partials(partials, 1, stripes, n)[0]

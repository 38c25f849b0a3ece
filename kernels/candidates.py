"""The activations of listed entries in full precision, of which those that reach their floor stay in the list.

The list is what `append_above_` with a spread leaves: entries that a cheaper product cannot rule out. An entry reads
its row of W, d * itemsize bytes, for 2d FLOPs: bound by memory. They stand as the filter found them, chunk by chunk
of features and tile by tile, so that rows of W and x come from L2. How many there are is read on the device:
programs beyond their end leave at once. A list that has overflowed stays as it is and is counted as it was: whoever
reads the count does what an overflow asks for. Every entry's sum is taken in one order, wherever it stands.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import activation, before_relu
from sampled_sae.kernels.arguments import check_features, check_matrix, check_vector, check_weights, contiguous_rows
from sampled_sae.kernels.configs import architecture, entry_dots_config, given, launch
from sampled_sae.kernels.gather_decode import dots_of_rows


@triton.jit(do_not_specialize=["B", "cap"])
def compute_candidates_kernel(
    left,
    W,
    b,
    scale,
    floors,
    values,
    keys,
    seen,
    count,
    computed,
    B,
    F,
    cap,
    stride_left,
    stride_W,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STRICT: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    n_seen = tl.load(seen)
    first = tl.program_id(0) * BE
    if n_seen > cap:
        if first == 0:
            tl.store(count, n_seen)
            tl.store(computed, n_seen)
        return
    if first >= n_seen:
        return
    o_e = first + tl.arange(0, BE)  # [BE]
    m_e = o_e < n_seen  # [BE]
    b_key = tl.load(keys + o_e, mask=m_e, other=0)  # [BE]
    b_i = b_key // F  # [BE]
    b_j = b_key - b_i * F  # [BE]
    m_a = m_e  # [BE]
    if STRICT:
        b_least = tl.load(floors + b_j, mask=m_e, other=0.0)  # [BE]
    else:
        b_least = tl.load(floors + b_i, mask=m_e, other=0.0)  # [BE]
        # a floor may have risen since the entry was found
        m_a = m_e & ~(tl.load(values + o_e, mask=m_e, other=0.0) < b_least)  # [BE]
    # entries that are out take the first rows, so loads need no mask
    b_i = tl.where(m_a, b_i, 0)  # [BE]
    b_j = tl.where(m_a, b_j, 0)  # [BE]
    b_a = dots_of_rows(left, W, b_i, b_j, stride_left, stride_W, 0, D, D, BE, BD)  # [BE]
    if STRICT:
        b_a = before_relu(b_a, b, scale, b_j, m_a, HAS_BIAS, HAS_SCALE)  # [BE]
        m_hit = m_a & (b_a > b_least)  # [BE]
    else:
        b_a = activation(b_a, b, scale, b_j, m_a, HAS_BIAS, HAS_SCALE)  # [BE]
        m_hit = m_a & (b_a > 0) & (b_a >= b_least)  # [BE]
    # several threads have read an entry that one of them writes
    tl.debug_barrier()
    tl.store(values + o_e, tl.where(m_hit, b_a, 0.0), mask=m_e)
    tl.store(keys + o_e, B.to(tl.int64) * F, mask=m_e & ~m_hit)
    tl.atomic_add(count, tl.sum(m_hit.to(tl.int64)), sem="relaxed")
    tl.atomic_add(computed, tl.sum(m_a.to(tl.int64)), sem="relaxed")


def compute_candidates_(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    floors: torch.Tensor,
    strict: bool,
    values: torch.Tensor,
    keys: torch.Tensor,
    seen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the `seen` entries listed first (int64 [1]) reach their floor, and how many were computed.

    Both are int64 [1], and equal to `seen` where that is beyond cap: the list stays as it is then. Else those that
    reach it get their activation as value, the others value 0 and key B * F. By token it is reached by
    a = relu(x_i . W_j + b_j) * scale_j that is > 0 and >= floors, fp32 [B]; with `strict`, by feature, by
    a = (x_i . W_j + b_j) * scale_j > floors, fp32 [F]. Without `strict` a value in the list is an upper bound, and an
    entry that is below its floor by it is not computed. values are fp32 [cap], keys int64 [cap], token * F + feature.
    x [B, d] and W [F, d] may be of two dtypes; sums are fp32. Equivalent to `a` at these places; no gradient.
    """
    check_matrix("x", x)
    check_weights(W)
    (B, D), F, cap = x.shape, W.shape[0], len(values)
    if W.shape[1] != D:
        raise ValueError(f"x [B, d] and W [F, d] expected, got {list(x.shape)} and {list(W.shape)}")
    check_features(b, scale, F)
    check_vector("floors", floors, torch.float32, F if strict else B)
    check_vector("values", values, torch.float32)
    check_vector("keys", keys, torch.int64, cap)
    check_vector("seen", seen, torch.int64, 1)
    if B == 0 or F == 0 or cap == 0:
        return seen.clone(), seen.clone()
    count, computed = (torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(2))
    x = contiguous_rows(x)
    launch(
        compute_candidates_kernel,
        entry_dots_config(architecture(x.device), W.dtype),
        lambda meta: (triton.cdiv(cap, meta["BE"]),),
        (x, W, b, scale, floors, values, keys, seen, count, computed, B, F, cap, x.stride(0), W.stride(0)),
        D=D,
        **given(bias=b, scale=scale),
        STRICT=strict,
    )
    return count, computed

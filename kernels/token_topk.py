"""The k largest strictly positive entries of each token, ties to the lower column: exact, without a sort.

One program a row: 4P bytes read and written (and 2P for a copy). Rows that `rows_config` has a place for stay in
registers, and a binary search on the bits counts entries until exactly k are left, or until only equal ones
are: at most 31 counts, 2P operations each, fewer where the k-th entry stands apart. Ties are ranked only in
rows that have them. Longer rows are read five times, for four histograms of 8 bits and to write.
A list has the entries of each token side by side, few more than k: one program each, which searches the bits of the
k-th and reads them again from L1.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import activation
from sampled_sae.kernels.arguments import check_block, check_vector
from sampled_sae.kernels.configs import LISTED, LONG_ROWS, architecture, given, launch, of_family, rows_config
from sampled_sae.kernels.interpreter import rounded
from sampled_sae.kernels.radix import is_kept, pick_digit, sort_bits


@triton.jit
def activated_row(z, b, scale, o_p, P, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr):
    """relu(z + b) * scale in the columns o_p of a row of P, and 0 past its end."""
    m_p = o_p < P  # as o_p
    b_z = tl.load(z + o_p, mask=m_p, other=0.0)  # as o_p
    return activation(b_z, b, scale, o_p, m_p, HAS_BIAS, HAS_SCALE)


@triton.jit
def search_cut(b_u, b_w, k, low, HAS_OTHER: tl.constexpr):
    """Over the bits of b_u (and b_w), from low >= 1: low, how many are >= low, and how many >= low + 1.

    Either at most k are >= low, and these are the k largest (the last is not counted then), or low is the cut.
    """
    low = tl.full([], 1, tl.int32) * low
    high = tl.max(b_u) + 1
    n_low = tl.sum((b_u >= low).to(tl.int32))
    n_high = 0
    if HAS_OTHER:
        high = tl.maximum(high, tl.max(b_w) + 1)
        n_low += tl.sum((b_w >= low).to(tl.int32))
    while (n_low > k) & (high - low > 1):
        # the cut is near the top: go down by 4 powers of two at most, where half the interval is 60
        middle = tl.maximum(low + (high - low) // 2, high - 0x02000000)
        n = tl.sum((b_u >= middle).to(tl.int32))
        if HAS_OTHER:
            n += tl.sum((b_w >= middle).to(tl.int32))
        enough = n >= k
        low = tl.where(enough, middle, low)
        n_low = tl.where(enough, n, n_low)
        high = tl.where(enough, high, middle)
        n_high = tl.where(enough, n_high, n)
    return low, n_low, n_high


@triton.jit
def search_end(b_u, o_p, cut, ties, LENGTH: tl.constexpr):
    """The index before which the first `ties` entries equal to the cut stand: a search, for a scan takes registers."""
    low = tl.full([], 0, tl.int32)
    high = tl.full([], LENGTH, tl.int32)
    while high - low > 1:
        middle = (low + high) // 2
        enough = tl.sum(((b_u == cut) & (o_p < middle)).to(tl.int32)) >= ties
        low = tl.where(enough, low, middle)
        high = tl.where(enough, middle, high)
    return tl.where(ties > 0, high, 0)


@triton.jit
def first_equal(b_u, cut, ties):
    """Mask of the first `ties` entries equal to the cut."""
    b_equal = (b_u == cut).to(tl.int32)
    return (b_equal > 0) & (tl.cumsum(b_equal) <= ties)


@triton.jit
def keep_rows_kernel(
    z,
    b,
    scale,
    copy,
    P,
    k,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BP: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    z += i_t * P
    o_p = tl.arange(0, BP)  # [BP]
    b_u = sort_bits(activated_row(z, b, scale, o_p, P, HAS_BIAS, HAS_SCALE))  # [BP]
    cut, n_cut, n_above = search_cut(b_u, None, k, 1, False)
    end = P
    if n_cut > k:
        end = search_end(b_u, o_p, cut, k - n_above, BP)

    b_z = tl.where(is_kept(b_u, o_p, cut, end), b_u.to(tl.float32, bitcast=True), 0.0)  # [BP]
    tl.store(z + o_p, b_z, mask=o_p < P)
    if HAS_COPY:
        tl.store(copy + i_t * P + o_p, rounded(b_z, copy.dtype.element_ty), mask=o_p < P)


@triton.jit
def keep_long_rows_kernel(
    z,
    b,
    scale,
    copy,
    k,
    P: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BP: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    z += i_t * P
    cut = 0
    left = k
    equal = 0
    for i_pass in tl.static_range(4):
        b_count = tl.zeros([256], dtype=tl.int32)  # [256]
        for i in range(0, P, BP):
            o_p = i + tl.arange(0, BP)  # [BP]
            b_u = sort_bits(activated_row(z, b, scale, o_p, P, HAS_BIAS, HAS_SCALE))  # [BP]
            # the sign bit is 0: a shift by 31 leaves the empty prefix of the first pass
            m_p = (o_p < P) & ((b_u >> min(31, 32 - 8 * i_pass)) == cut)  # [BP]
            b_count += tl.histogram((b_u >> (24 - 8 * i_pass)) & 255, 256, mask=m_p)  # [256]
        digit, left = pick_digit(b_count, left)
        equal = tl.sum(tl.where(tl.arange(0, 256) == digit, b_count, 0))
        cut = cut * 256 + digit

    left = tl.where(cut > 0, left, 0)
    is_split = (left > 0) & (left < equal)
    floor = tl.where((left > 0) & (left == equal), cut, cut + 1)
    for i in range(0, P, BP):
        o_p = i + tl.arange(0, BP)  # [BP]
        b_z = activated_row(z, b, scale, o_p, P, HAS_BIAS, HAS_SCALE)  # [BP]
        b_u = sort_bits(b_z)  # [BP]
        b_keep = b_u >= floor  # [BP]
        if is_split:
            b_keep |= first_equal(b_u, cut, left)  # [BP]
            left -= tl.sum((b_u == cut).to(tl.int32))
        b_z = tl.where(b_keep, b_z, 0.0)  # [BP]
        tl.store(z + o_p, b_z, mask=o_p < P)
        if HAS_COPY:
            tl.store(copy + i_t * P + o_p, rounded(b_z, copy.dtype.element_ty), mask=o_p < P)


@triton.jit
def keep_listed_kernel(values, ends, k, BE: tl.constexpr):
    i_t = tl.program_id(0)
    start = tl.load(ends + i_t)
    n = (tl.load(ends + i_t + 1) - start).to(tl.int32)
    if n <= k:
        return
    values += start
    # at least k are >= low, fewer are >= high
    low = tl.full([], 1, tl.int32)
    high = tl.full([], 0x7F800002, tl.int32)
    above = 0
    while high - low > 1:
        middle = low + (high - low) // 2
        n_middle = 0
        i = 0
        while i < n:
            o_e = i + tl.arange(0, BE)  # [BE]
            b_u = sort_bits(tl.load(values + o_e, mask=o_e < n, other=0.0))  # [BE]
            n_middle += tl.sum((b_u >= middle).to(tl.int32))
            i += BE
        enough = n_middle >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        above = tl.where(enough, above, n_middle)
    left = k - above
    i = 0
    while i < n:
        o_e = i + tl.arange(0, BE)  # [BE]
        m_e = o_e < n  # [BE]
        b_u = sort_bits(tl.load(values + o_e, mask=m_e, other=0.0))  # [BE]
        m_keep = (b_u > low) | first_equal(b_u, low, left)  # [BE]
        left -= tl.sum((b_u == low).to(tl.int32))
        tl.store(values + o_e, 0.0, mask=m_e & ~m_keep)
        i += BE


def keep_rows_(
    z: torch.Tensor,
    k: int,
    b: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> None:
    """Overwrite z [B, P], a raw product, by a = relu(z + b) * scale, of each row the k largest positive entries alone.

    Ties go to the lower column. `copy` [B, P] is written with the result in its own dtype.
    Equivalent to `a * zeros_like(a).scatter(1, a.topk(k).indices, 1)`, ties aside; no gradient.
    """
    check_block(z, b, scale, copy)
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    B, P = z.shape
    if z.numel() == 0 or k == 0:
        z.zero_()
        if copy is not None:
            copy.zero_()
        return
    config, optional = rows_config(architecture(z.device), P), given(bias=b, scale=scale, copy=copy)
    if config is not None:
        launch(keep_rows_kernel, config, (B,), (z, b, scale, copy, P, k), **optional)
    else:
        config = of_family(LONG_ROWS, z.device)
        launch(keep_long_rows_kernel, config, (B,), (z, b, scale, copy, min(k, P)), P=P, **optional)


def keep_listed_(values: torch.Tensor, ends: torch.Tensor, k: int) -> None:
    """Put 0 in the place of all but the k largest of each token's entries in a list, values fp32 [N] > 0; in place.

    Those of token i stand from ends[i] on, up to ends[i + 1] (int64 [B + 1], ascending). Ties go to what stands first.
    Equivalent to `keep_rows_` on each token's part of the list.
    """
    check_vector("values", values, torch.float32)
    check_vector("ends", ends, torch.int64)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    n_tokens = len(ends) - 1
    if n_tokens > 0 and len(values) > 0:
        launch(keep_listed_kernel, of_family(LISTED, values.device), (n_tokens,), (values, ends, k))

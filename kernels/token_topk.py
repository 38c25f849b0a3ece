"""The k largest strictly positive entries of each token, ties to the lower column: exact, without a sort.

One program a row: 4P bytes read and written (and 2P for a copy). Rows that `rows_config` has a place for stay in
registers, and a binary search on the bits counts entries until exactly k are left, or until only equal ones
are: at most 31 counts, 2P operations each, fewer where the k-th entry stands apart. Ties are ranked only in
rows that have them. Longer rows are read five times, for four histograms of 8 bits and to write.
`merge_rows_` keeps the k best of a stream of feature chunks, which is read once: what stands in the row so far
is the lower bound of the search, and a row with nothing above it leaves at once.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import activation, spread_of
from sampled_sae.kernels.arguments import Spread, check_block, check_spread, check_vector, spread_arguments
from sampled_sae.kernels.configs import MERGED_ROWS, architecture, launch, long_rows_config, merge_config, rows_config
from sampled_sae.kernels.interpreter import rounded
from sampled_sae.kernels.radix import is_kept, pick_digit, sort_bits

MAX_K = 512
MAX_CHUNK = MERGED_ROWS[-1][0]


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
def chunk_row(
    z,
    b,
    scale,
    norms,
    errors,
    of_norms,
    of_errors,
    of_bias,
    o_c,
    C,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
):
    """`activated_row`; with a spread, what the activations are at least."""
    m_c = o_c < C  # as o_c
    b_z = tl.load(z + o_c, mask=m_c, other=0.0)  # as o_c
    if HAS_SPREAD:
        b_z -= spread_of(norms, errors, of_norms, of_errors, of_bias, o_c * 0, m_c, o_c, m_c)  # as o_c
    return activation(b_z, b, scale, o_c, m_c, HAS_BIAS, HAS_SCALE)


@triton.jit(do_not_specialize=["first"])
def merge_rows_kernel(
    best_values,
    best_features,
    z,
    features,
    b,
    scale,
    norms,
    errors,
    of_norms,
    of_errors,
    of_bias,
    needed,
    C,
    k,
    first,
    HAS_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    HAS_NEEDED: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    if HAS_NEEDED:
        if tl.load(needed) == 0:
            return
    i_t = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BK)  # [BK]
    o_c = tl.arange(0, BC)  # [BC]
    m_k = o_k < k  # [BK]
    best_values += i_t * k
    best_features += i_t * k
    z += i_t * C
    if HAS_SPREAD:
        norms += i_t
        errors += i_t
    b_best = tl.load(best_values + o_k, mask=m_k, other=0.0)  # [BK]
    b_u = sort_bits(b_best)  # [BK]
    b_w = sort_bits(
        chunk_row(
            z, b, scale, norms, errors, of_norms, of_errors, of_bias, o_c, C, HAS_BIAS, HAS_SCALE, HAS_SPREAD
        )
    )  # [BC]
    # 0 while a slot is unused, else the k-th best so far, to which a newcomer loses ties
    least = tl.min(tl.where(m_k, b_u, 0x7FFFFFFF))
    if tl.max(b_w) <= least:
        return

    b_f = tl.load(best_features + o_k, mask=m_k, other=0)  # [BK]
    cut, n_cut, n_above = search_cut(b_u, b_w, k, tl.maximum(least, 1), True)
    end_stay = k
    end_enter = C
    if n_cut > k:
        ties = k - n_above
        end_stay = search_end(b_u, o_k, cut, ties, BK)
        end_enter = search_end(b_w, o_c, cut, ties - tl.sum((b_u == cut).to(tl.int32)), BC)
    b_stay = is_kept(b_u, o_k, cut, end_stay).to(tl.int32)  # [BK]
    # entries move to lower slots of their row: all of it must have been read
    tl.debug_barrier()
    o_slot = tl.cumsum(b_stay) - 1  # [BK]
    tl.store(best_values + o_slot, b_best, mask=b_stay > 0)
    tl.store(best_features + o_slot, b_f, mask=b_stay > 0)

    # newcomers are read again, from cache: a scan and a scatter of a whole chunk would take most registers
    taken = tl.sum(b_stay)
    for i in range(0, BC, BS):
        o_s = i + tl.arange(0, BS)  # [BS]
        b_a = chunk_row(
            z, b, scale, norms, errors, of_norms, of_errors, of_bias, o_s, C, HAS_BIAS, HAS_SCALE, HAS_SPREAD
        )  # [BS]
        b_enter = is_kept(sort_bits(b_a), o_s, cut, end_enter).to(tl.int32)  # [BS]
        n_enter = tl.sum(b_enter)
        if n_enter > 0:
            o_new = taken + tl.cumsum(b_enter) - 1  # [BS]
            if HAS_FEATURES:
                b_new = tl.load(features + o_s, mask=b_enter > 0, other=0).to(tl.int32)  # [BS]
            else:
                b_new = first + o_s  # [BS]
            tl.store(best_values + o_new, b_a, mask=b_enter > 0)
            tl.store(best_features + o_new, b_new, mask=b_enter > 0)
        taken += n_enter


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
    arch = architecture(z.device)
    config = rows_config(arch, P)
    given = {"HAS_BIAS": b is not None, "HAS_SCALE": scale is not None, "HAS_COPY": copy is not None}
    if config is not None:
        launch(keep_rows_kernel, config, (B,), (z, b, scale, copy, P, k), **given)
    else:
        launch(keep_long_rows_kernel, long_rows_config(arch), (B,), (z, b, scale, copy, min(k, P)), P=P, **given)


def merge_rows_(
    best_values: torch.Tensor,
    best_features: torch.Tensor,
    z: torch.Tensor,
    features: int | torch.Tensor,
    b: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    spread: Spread | None = None,
    needed: torch.Tensor | None = None,
) -> None:
    """Merge a chunk of features into the k best so far of each token, in place; repeated, TopK over all features.

    best_values [B, k] fp32 and best_features [B, k] int32 are in ascending feature order; unused slots, at the
    end, hold 0 and 2**31 - 1. z [B, C] is the raw product of the chunk, taken as relu(z + b) * scale. `features`
    are those of its columns, int64 [C], ascending, or the first of C in a row; all are higher than those merged
    before. Ties go to the lower feature. Equivalent to the k largest strictly positive of both together.
    With a `spread` z may be off by it, and entries count as what they are at least. Where `needed`, int64 [1], is 0,
    nothing is done.
    """
    check_block(z, b, scale)
    B, C = z.shape
    if best_values.ndim != 2 or best_values.shape[0] != B or best_values.dtype != torch.float32:
        raise ValueError(f"best_values must be fp32 [{B}, k], got {best_values.dtype} {list(best_values.shape)}")
    if best_features.shape != best_values.shape or best_features.dtype != torch.int32:
        shape = list(best_values.shape)
        raise ValueError(f"best_features must be int32 {shape}, got {best_features.dtype} {list(best_features.shape)}")
    if not (best_values.is_contiguous() and best_features.is_contiguous()):
        raise ValueError("best_values and best_features must be contiguous")
    k = best_values.shape[1]
    if C > MAX_CHUNK or k > MAX_K:
        raise ValueError(f"chunks of at most {MAX_CHUNK} features and k of at most {MAX_K}, got {C} and {k}")
    has_features = isinstance(features, torch.Tensor)
    if has_features:
        check_vector("features", features, torch.int64, C)
    check_spread(spread, B, C)
    if needed is not None:
        check_vector("needed", needed, torch.int64, 1)
    if z.numel() == 0 or k == 0:
        return
    listed, first = (features, 0) if has_features else (None, features)
    launch(
        merge_rows_kernel,
        merge_config(C),
        (B,),
        (best_values, best_features, z, listed, b, scale, *spread_arguments(spread), needed, C, k, first),
        HAS_FEATURES=has_features,
        HAS_BIAS=b is not None,
        HAS_SCALE=scale is not None,
        HAS_SPREAD=spread is not None,
        HAS_NEEDED=needed is not None,
        BK=triton.next_power_of_2(k),
    )

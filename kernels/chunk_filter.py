"""Entries of a = relu(z + b) * scale at or above a threshold, appended to a list of fixed capacity.

Or those of (z + b) * scale strictly above a floor for each feature, which may be negative. With a spread, by which the
product may be off, those that may be such entries, a NaN among them, with what they are at most.

Bytes: the product z [B, C] once, 4BC, and 12 for each entry found; a few FLOPs an entry, so bound by memory.
The threshold is read on the device. A program is one warp and looks at STEPS tiles of BT tokens x BF features; of
each it keeps a word a lane, one bit for each of the lane's BT * VECTOR entries. The hits of all its tiles take their
slots by one integer atomic and prefix sums, and those few entries alone are read again, from L1 or L2. The order
of the programs in the list is that of the atomics, so entries carry a unique key by which they are sorted later.
Whoever appends more than fits learns it from the count.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import activation, before_relu, spread_of
from sampled_sae.kernels.arguments import (
    Spread,
    check_list,
    check_products,
    check_vector,
    listed_or_first,
    spread_arguments,
)
from sampled_sae.kernels.configs import SCALAR, architecture, chunk_filter_config, given, launch
from sampled_sae.kernels.radix import PASSES, find_cut, picked


@triton.jit
def filtered(b_z, b, scale, o_f, m_f, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_FLOORS: tl.constexpr):
    """What is compared and kept of a product: its activation, or with floors what that is before its relu."""
    if HAS_FLOORS:
        return before_relu(b_z, b, scale, o_f, m_f, HAS_BIAS, HAS_SCALE)
    else:
        return activation(b_z, b, scale, o_f, m_f, HAS_BIAS, HAS_SCALE)


@triton.jit
def lowest_bit(b_w):
    """(The lowest bit of an int32 alone, its number): 0 has 0 and 0."""
    b_low = b_w & (0 - b_w)
    # its number is its exponent as a float
    b_bit = b_low.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    return b_low, tl.maximum((b_bit >> 23) - 127, 0)


@triton.jit(do_not_specialize=["B", "first", "cap"])
def append_above_kernel(
    z,
    b,
    scale,
    features,
    tau,
    norms,
    errors,
    of_norms,
    of_errors,
    of_bias,
    values,
    keys,
    count,
    B,
    C,
    F,
    first,
    cap,
    stride_z,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FEATURES: tl.constexpr,
    HAS_FLOORS: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    STEPS: tl.constexpr,
):
    # entries side by side that a lane loads at once; a word has a bit for each of a lane's entries of a tile
    VECTOR: tl.constexpr = 4
    LANES: tl.constexpr = BF // VECTOR
    tl.static_assert(BT * VECTOR == 32)
    n_features = tl.cdiv(C, BF)
    first_f = tl.program_id(0) % n_features * BF
    first_t = tl.program_id(0) // n_features * (BT * STEPS)
    o_f = first_f + tl.arange(0, BF)  # [BF]
    m_f = o_f < C  # [BF]
    o_s = tl.arange(0, STEPS)[:, None]  # [STEPS, 1]
    o_bit = tl.arange(0, BT)[:, None, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]  # [BT, 1, VECTOR]
    if HAS_FLOORS:
        b_least = tl.load(tau + o_f, mask=m_f, other=0.0)[None, :]  # [1, BF]
    elif not HAS_SPREAD:
        b_least = tl.load(tau)

    b_words = tl.zeros([STEPS, LANES], dtype=tl.int32)  # [STEPS, LANES]
    b_n = tl.zeros([STEPS, LANES], dtype=tl.int32)  # [STEPS, LANES]
    for i in range(STEPS):
        o_t = (first_t + i * BT + tl.arange(0, BT)).to(tl.int64)  # [BT]
        m_t = o_t < B  # [BT]
        m_z = m_t[:, None] & m_f[None, :]  # [BT, BF]
        b_z = tl.load(z + o_t[:, None] * stride_z + o_f[None, :], mask=m_z, other=0.0)  # [BT, BF]
        if HAS_SPREAD:
            b_z += spread_of(
                norms, errors, of_norms, of_errors, of_bias, o_t[:, None], m_t[:, None], o_f[None, :], m_f[None, :]
            )  # [BT, BF]
        b_a = filtered(b_z, b, scale, o_f[None, :], m_f[None, :], HAS_BIAS, HAS_SCALE, HAS_FLOORS)  # [BT, BF]
        if HAS_SPREAD and HAS_FLOORS:
            m_hit = m_z & ~(b_a <= b_least)  # [BT, BF]
        elif HAS_SPREAD:
            b_of_token = tl.load(tau + o_t, mask=m_t, other=0.0)[:, None]  # [BT, 1]
            m_hit = m_z & ~(b_a <= 0) & ~(b_a < b_of_token)  # [BT, BF]
        elif HAS_FLOORS:
            m_hit = m_z & (b_a > b_least)  # [BT, BF]
        else:
            m_hit = m_z & (b_a > 0) & (b_a >= b_least)  # [BT, BF]
        b_hit = tl.reshape(m_hit.to(tl.int32), [BT, LANES, VECTOR])  # [BT, LANES, VECTOR]
        b_word = tl.sum(tl.sum(b_hit << o_bit, axis=2), axis=0)  # [LANES]
        b_words = tl.where(o_s == i, b_word[None, :], b_words)  # [STEPS, LANES]
        b_n = tl.where(o_s == i, tl.sum(tl.sum(b_hit, axis=2), axis=0)[None, :], b_n)  # [STEPS, LANES]

    b_of_lane = tl.sum(b_n, axis=0)  # [LANES]
    n_hits = tl.sum(b_of_lane, axis=0)
    if n_hits > 0:
        start = tl.atomic_add(count, n_hits.to(tl.int64), sem="relaxed")
        # of a full list the number alone counts
        n_hits = tl.where(start < cap, n_hits, 0)
        b_before = (tl.cumsum(b_of_lane, axis=0) - b_of_lane)[None, :] + tl.cumsum(b_n, axis=0) - b_n
        b_at = start + b_before  # [STEPS, LANES]
        o_l = first_f + tl.arange(0, LANES)[None, :] * VECTOR  # [1, LANES]
        while n_hits > 0:
            m_hit = b_words != 0  # [STEPS, LANES]
            b_low, b_bit = lowest_bit(b_words)  # [STEPS, LANES]
            b_t = (first_t + o_s * BT + b_bit // VECTOR).to(tl.int64)  # [STEPS, LANES]
            b_f = o_l + b_bit % VECTOR  # [STEPS, LANES]
            b_z = tl.load(z + b_t * stride_z + b_f, mask=m_hit, other=0.0)  # [STEPS, LANES]
            if HAS_SPREAD:
                b_z += spread_of(norms, errors, of_norms, of_errors, of_bias, b_t, m_hit, b_f, m_hit)  # [STEPS, LANES]
            b_a = filtered(b_z, b, scale, b_f, m_hit, HAS_BIAS, HAS_SCALE, HAS_FLOORS)  # [STEPS, LANES]
            if HAS_FEATURES:
                b_key = tl.load(features + b_f, mask=m_hit, other=0)  # [STEPS, LANES]
            else:
                b_key = b_f.to(tl.int64) + first  # [STEPS, LANES]
            m_fits = m_hit & (b_at < cap)  # [STEPS, LANES]
            tl.store(values + b_at, b_a, mask=m_fits)
            tl.store(keys + b_at, b_t * F + b_key, mask=m_fits)
            b_words ^= b_low
            b_at += m_hit.to(tl.int64)
            n_hits -= tl.sum(tl.sum(m_hit.to(tl.int32), axis=0), axis=0)


@triton.jit
def first_threshold_kernel(histograms, out):
    cut, _ = picked(histograms, PASSES - 1)
    tl.store(out, cut.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["n"])
def next_threshold_kernel(smallest, tau, count, out, n):
    b_v = tl.load(smallest)
    b_c = tl.load(count)
    LN_MARGIN: tl.constexpr = 0.3364722366212129  # ln 1.4
    b_surplus = tl.log(tl.maximum(b_c, n + 1).to(tl.float32) / n)
    b_step = (b_v - tl.load(tau)) * (LN_MARGIN / b_surplus)
    b_step = tl.where(b_c > n, b_step, 0.04 * b_v)
    tl.store(out, b_v - tl.minimum(tl.maximum(b_step, 0.01 * b_v), 0.2 * b_v))


def append_above_(
    z: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    features: torch.Tensor | int,
    n_features: int,
    tau: torch.Tensor,
    values: torch.Tensor,
    keys: torch.Tensor,
    count: torch.Tensor,
    floors: torch.Tensor | None = None,
    spread: Spread | None = None,
) -> None:
    """Appends the entries > 0 and >= tau of relu(z + b) * scale to values and keys, and their number to count.

    With `floors` fp32 [C], one for each column, those of (z + b) * scale that are > floors; tau is not read then.
    With a `spread` z may be off by it: what is not ruled out is appended, with an upper bound as its value, and tau is
    fp32 [B], one for each token.

    z [B, C] is the product for `features`, int64 [C], or for C features from `features` on. The key of an entry
    is token * n_features + feature. With `at = ((a > 0) & (a >= tau)).nonzero()` equivalent, but for the
    order, to `values[count:] = a[at]; keys[count:] = at[0] * n_features + features[at[1]]; count += len(at)`.
    """
    check_products(z, b, scale)
    B, C = z.shape
    listed, first = listed_or_first(features, C)
    of_spread = spread_arguments(spread, B, C)
    if spread is None or floors is None:
        check_vector("tau", tau, torch.float32, 1 if spread is None else B)
    if floors is not None:
        check_vector("floors", floors, torch.float32, C)
    check_list(values, keys, count)
    if B == 0 or C == 0:
        return
    least = tau if floors is None else floors
    launch(
        append_above_kernel,
        chunk_filter_config(architecture(z.device)),
        lambda meta: (triton.cdiv(B, meta["BT"] * meta["STEPS"]) * triton.cdiv(C, meta["BF"]),),
        (
            *(z, b, scale, listed, least, *of_spread, values, keys, count),
            *(B, C, n_features, first, len(values), z.stride(0)),
        ),
        **given(bias=b, scale=scale, features=listed, floors=floors, spread=spread),
    )


def first_threshold(z: torch.Tensor, b: torch.Tensor | None, scale: torch.Tensor | None, n: int) -> torch.Tensor:
    """The n-th largest of relu(z + b) * scale, fp32 [1], on the device; z [B, C], contiguous, is overwritten by it."""
    check_products(z, b, scale)
    if not z.is_contiguous():
        raise ValueError("z must be contiguous: it is overwritten")
    if not 0 < n <= z.numel():
        raise ValueError(f"n must be between 1 and {z.numel()}, got {n}")
    out = torch.empty(1, dtype=torch.float32, device=z.device)
    cut = find_cut(z, n, b, scale)
    launch(first_threshold_kernel, SCALAR, (1,), (cut.histograms, out))
    return out


def next_threshold(smallest: torch.Tensor, tau: torch.Tensor, count: torch.Tensor, n: int) -> torch.Tensor:
    """A threshold that lets about 1.4 n entries of a like batch through: fp32 [1], on the device.

    This batch had `count` entries >= tau (int64 [1], fp32 [1]), the n-th largest of which is `smallest` (fp32, one
    element; 0 where there are fewer than n, and so is the result). ln(count) is taken as linear between the
    two; where count is no more than n, as after an exact repair, 0.96 of the smallest has to do.
    """
    check_vector("tau", tau, torch.float32, 1)
    check_vector("count", count, torch.int64, 1)
    out = torch.empty_like(tau)
    launch(next_threshold_kernel, SCALAR, (1,), (smallest, tau, count, out, n))
    return out

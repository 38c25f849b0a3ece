"""Entries of a = relu(x @ W.T + b) * scale at or above a threshold, appended to a list; no product is written.

Or those of (x @ W.T + b) * scale strictly above a floor for each feature. FLOPs: 2BPd. Bytes, at the least: the
operands, (B + P)d values, and 12 for each entry found. Each tile keeps a bit for each of its entries, in a word for
those that a lane of a matrix unit holds of a row. The hits of all words take their slots by one atomic and a prefix
sum, and each word gives up one hit a round, which it picks from the registers: words with two hits are rare.
Tiles, values and their rounding are those of exact_fallback.py: what a repair finds has the same bits.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import before_relu, product_tile, tile_of_block
from sampled_sae.kernels.arguments import check_encoder, check_list, check_vector, contiguous_rows
from sampled_sae.kernels.chunk_filter import lowest_bit
from sampled_sae.kernels.configs import architecture, given, launch, product_filter_config

# how NVIDIA's matrix units leave a row: PAIR columns side by side with each of LANES lanes, then the next 8
LANES, PAIR = tl.constexpr(4), tl.constexpr(2)


@triton.jit
def bits_set(b_w):
    """How many bits of an int32 are 1."""
    b_w = b_w - ((b_w >> 1) & 0x55555555)
    b_w = (b_w & 0x33333333) + ((b_w >> 2) & 0x33333333)
    b_w = (b_w + (b_w >> 4)) & 0x0F0F0F0F
    b_w += b_w >> 8
    return (b_w + (b_w >> 16)) & 63


@triton.jit
def by_lane(b_z, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] as [BM, LANES, BN // LANES]: what a lane holds of a row, side by side."""
    b_z = tl.permute(tl.reshape(b_z, [BM, BN // (LANES * PAIR), LANES, PAIR]), (0, 2, 1, 3))
    return tl.reshape(b_z, [BM, LANES, BN // LANES])


@triton.jit(do_not_specialize=["B", "P", "cap"])
def append_products_kernel(
    x,
    W,
    b,
    scale,
    members,
    least,
    values,
    keys,
    count,
    B,
    P,
    F,
    cap,
    stride_x,
    stride_W,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_MEMBERS: tl.constexpr,
    HAS_FLOORS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_f, i_t = tile_of_block(tl.program_id(0), tl.cdiv(P, BM), tl.cdiv(B, BN), GROUP)
    o_m = i_f * BM + tl.arange(0, BM)  # [BM]
    o_t = i_t * BN + tl.arange(0, BN)  # [BN]
    m_f = (o_m < P)[:, None]  # [BM, 1]
    b_f = tl.minimum(o_m, P - 1)  # [BM]
    if HAS_MEMBERS:
        b_f = tl.load(members + b_f)  # [BM]
    b_a = product_tile(x, W, tl.minimum(o_t, B - 1), b_f, stride_x, stride_W, D, BM, BN, BD)  # [BM, BN]
    # what is above zero has no need of a relu
    b_a = before_relu(b_a, b, scale, b_f[:, None], m_f, HAS_BIAS, HAS_SCALE)  # [BM, BN]
    if HAS_FLOORS:
        m_hit = b_a > tl.load(least + b_f[:, None], mask=m_f, other=0.0)  # [BM, BN]
    else:
        SMALLEST: tl.constexpr = 1.401298464324817e-45  # above zero
        m_hit = b_a >= tl.maximum(tl.load(least), SMALLEST, propagate_nan=tl.PropagateNan.ALL)  # [BM, BN]

    BITS: tl.constexpr = BN // LANES
    tl.static_assert(BITS <= 32)
    o_bit = tl.arange(0, BITS)  # [BITS]
    b_word = tl.sum(by_lane(m_hit.to(tl.int32), BM, BN) << o_bit[None, None, :], axis=2)  # [BM, LANES]
    # past the end the last row was multiplied again
    b_real = tl.sum(by_lane((o_t < B).to(tl.int32)[None, :], 1, BN) << o_bit[None, None, :], axis=2)  # [1, LANES]
    b_word = tl.where(m_f, b_word & b_real, 0)  # [BM, LANES]
    b_n = tl.reshape(bits_set(b_word), [BM * LANES])  # [BM * LANES]
    b_ends = tl.cumsum(b_n, axis=0)  # [BM * LANES]
    # not the sum: Triton 3.6 fails on sm_100 where an accumulator is reduced to a number with no scan in between
    n_hits = tl.max(b_ends, axis=0)
    if n_hits > 0:
        start = tl.atomic_add(count, n_hits.to(tl.int64), sem="relaxed")
        # of a full list the number alone counts
        n_hits = tl.where(start < cap, n_hits, 0)
        b_at = tl.reshape(b_ends - b_n, [BM, LANES]) + start  # [BM, LANES]
        b_tile = by_lane(b_a, BM, BN)  # [BM, LANES, BITS]
        o_l = i_t * BN + tl.arange(0, LANES)[None, :] * PAIR  # [1, LANES]
        while n_hits > 0:
            m_word = b_word != 0  # [BM, LANES]
            b_low, b_bit = lowest_bit(b_word)  # [BM, LANES]
            b_v = tl.sum(tl.where(b_bit[:, :, None] == o_bit[None, None, :], b_tile, 0.0), axis=2)  # [BM, LANES]
            b_t = (o_l + b_bit // PAIR * (LANES * PAIR) + b_bit % PAIR).to(tl.int64)  # [BM, LANES]
            tl.store(values + b_at, b_v, mask=m_word & (b_at < cap))
            tl.store(keys + b_at, b_t * F + b_f[:, None], mask=m_word & (b_at < cap))
            b_word ^= b_low
            b_at += 1
            n_hits -= tl.sum(tl.sum(m_word.to(tl.int32), axis=1), axis=0)


def append_products_above_(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    members: torch.Tensor | None,
    tau: torch.Tensor,
    values: torch.Tensor,
    keys: torch.Tensor,
    count: torch.Tensor,
    floors: torch.Tensor | None = None,
) -> None:
    """Appends the entries > 0 and >= tau of a = relu(x W^T + b) * scale to values and keys, and their number to count.

    x [B, d] and W [F, d] are of one dtype of 16 bits. Candidates are members, int64 [P], or all features. With `floors`
    fp32 [F] those of (x W^T + b) * scale that are > floors; tau is not read then. tau is fp32 [1] on the device, values
    fp32 [cap], keys int64 [cap], count int64 [1]; a count above cap says that some are missing.
    Equivalent, but for the order, to `append_above_` on the product, whose keys are token * F + feature.
    """
    check_encoder(x, W, b, scale)
    if x.dtype == torch.float32:
        raise ValueError(f"x and W must have 16 bits, got {x.dtype}")
    (B, D), F = x.shape, W.shape[0]
    if members is not None:
        check_vector("members", members, torch.int64)
    if floors is None:
        check_vector("tau", tau, torch.float32, 1)
    else:
        check_vector("floors", floors, torch.float32, F)
    check_list(values, keys, count)
    P = F if members is None else len(members)
    if B == 0 or P == 0:
        return
    x = contiguous_rows(x)
    least = tau if floors is None else floors
    launch(
        append_products_kernel,
        product_filter_config(architecture(x.device), x.dtype),
        lambda meta: (triton.cdiv(P, meta["BM"]) * triton.cdiv(B, meta["BN"]),),
        (x, W, b, scale, members, least, values, keys, count, B, P, F, len(values), x.stride(0), W.stride(0)),
        D=D,
        **given(bias=b, scale=scale, members=members, floors=floors),
    )

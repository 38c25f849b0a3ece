"""The n largest entries of relu(x @ W.T + b) * scale, found again where the filter by a guessed threshold failed.

A radix selection that stores no activation: every pass multiplies all tiles anew, 2BPd FLOPs, by the same code in
one compiled kernel, so that all passes see the same bits. Four passes of 8 bits find the cut; where more entries
equal it than are left to find, passes over the digits of token and feature go on; the last pass appends. Each pass
counts in a histogram of its own, from which every program of the next one picks: no pass waits for the host, and a
pass with nothing to do leaves at once, as all do where the filter was right. Programs are as many as the GPU holds
and walk over the tiles, which makes such a pass cheap.
The values are those of this product. product_filter.py multiplies in the same tiles: after it a repair changes no bit.
cuBLAS sums in another order, and in fp32 may take TF32: a repair then changes the last bits of values (or TF32's
rounding), and which of the entries are kept that lie closer than this to the cut.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import activation, product_tile, tile_of_block
from sampled_sae.kernels.arguments import check_encoder, check_list, check_vector, contiguous_rows
from sampled_sae.kernels.configs import architecture, exact_fallback_config, given, launch, resident_programs
from sampled_sae.kernels.radix import pick_digit

VALUE_DIGITS = tl.constexpr(4)
# of each pass: 256 bins, then the search as it begins: status, digits found, entries left to find, and the digits
# of value, token and feature
WIDTH = tl.constexpr(262)
IDLE, SEARCHING, FOUND = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def append(m_hit, b_values, b_keys, values, keys, count, cap):
    """The hits of a tile, put behind what is in the list; those beyond `cap` are counted alone."""
    b_hit = m_hit.to(tl.int32)  # [M, N]
    b_n = tl.sum(b_hit, axis=1)  # [M]
    n_hits = tl.sum(b_n, axis=0)
    if n_hits > 0:
        first = tl.atomic_add(count, n_hits.to(tl.int64), sem="relaxed")
        room = tl.minimum(tl.maximum(cap - first, 0), n_hits).to(tl.int32)
        b_at = (tl.cumsum(b_n, axis=0) - b_n - 1)[:, None] + tl.cumsum(b_hit, axis=1)  # [M, N]
        m_fits = m_hit & (b_at < room)  # [M, N]
        tl.store(values + first + b_at, b_values, mask=m_fits)
        tl.store(keys + first + b_at, b_keys, mask=m_fits)


@triton.jit
def search_so_far(p_pass, token_digits):
    """The search as a pass began it, narrowed by what that pass counted."""
    status, found, left = tl.load(p_pass + 256), tl.load(p_pass + 257), tl.load(p_pass + 258)
    value, token, feature = tl.load(p_pass + 259), tl.load(p_pass + 260), tl.load(p_pass + 261)
    if status == SEARCHING:
        b_count = tl.load(p_pass + tl.arange(0, 256))  # [256]
        if tl.sum(b_count) <= left:
            status += 1
        else:
            digit, left = pick_digit(b_count, left)
            if found < VALUE_DIGITS:
                value = value * 256 + digit
            elif found < token_digits + VALUE_DIGITS:
                token = token * 256 + digit
            else:
                feature = feature * 256 + digit
            found += 1
            status += (tl.sum(tl.where(tl.arange(0, 256) == digit, b_count, 0)) == left).to(tl.int64)
    return status, found, left, value, token, feature


@triton.jit
def unknown_bits(digits, found):
    """By how much to shift a word of `digits` digits, so that the `found` ones remain; it has at most 31 bits."""
    known = tl.minimum(tl.maximum(found, 0), digits)
    return tl.minimum(-8 * known + 8 * digits, 31)


@triton.jit(do_not_specialize=["B", "P", "n", "cap", "i_pass", "token_digits", "feature_digits"])
def refill_kernel(
    x,
    W,
    b,
    scale,
    members,
    tau,
    values,
    keys,
    count,
    histograms,
    scratch,
    B,
    P,
    F,
    n,
    cap,
    i_pass,
    token_digits,
    feature_digits,
    stride_x,
    stride_W,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_MEMBERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
    BS: tl.constexpr,
):
    i = tl.program_id(0)
    # the first histogram is that of a pass before the first, and all zeros
    p_pass = histograms + (i_pass + 1) * WIDTH
    status, found, left, value, token, feature = search_so_far(p_pass - WIDTH, token_digits)
    if i_pass == 0:
        appended = tl.load(count)
        floor = tl.load(tau)
        # a floor that is not a number let nothing through
        failed = (appended > cap) | ((appended < n) & ((floor > 0) | (floor != floor)))
        status += failed.to(tl.int64)
        left += n
    if i == 0:
        tl.store(p_pass + 256, status)
        tl.store(p_pass + 257, found)
        tl.store(p_pass + 258, left)
        tl.store(p_pass + 259, value)
        tl.store(p_pass + 260, token)
        tl.store(p_pass + 261, feature)
    if (i_pass == 1) & (status != IDLE):
        if i == 0:
            tl.store(count, 0)
        CLEAR: tl.constexpr = 1024
        start = i.to(tl.int64) * CLEAR
        while start < cap:
            o_e = start + tl.arange(0, CLEAR)  # [CLEAR]
            tl.store(values + o_e, 0.0, mask=o_e < cap)
            tl.store(keys + o_e, B.to(tl.int64) * F, mask=o_e < cap)
            start += tl.num_programs(0) * CLEAR

    found, value, token, feature = (found.to(tl.int32), value.to(tl.int32), token.to(tl.int32), feature.to(tl.int32))
    before_feature = token_digits + VALUE_DIGITS
    digits = before_feature + feature_digits
    is_last = i_pass == digits
    value_shift = unknown_bits(VALUE_DIGITS, found)
    token_shift = unknown_bits(token_digits, found - VALUE_DIGITS)
    feature_shift = unknown_bits(feature_digits, found - before_feature)
    # the digit that this pass counts
    in_value = found < VALUE_DIGITS
    in_token = found < before_feature
    ends = tl.where(in_value, VALUE_DIGITS, tl.where(in_token, before_feature, digits))
    digit_shift = 8 * tl.maximum(ends - 1 - found, 0)

    T = tl.cdiv(B, BN)
    n_tiles = tl.cdiv(P, BM) * T
    if (status != SEARCHING) & ((status == IDLE) | (i_pass < digits)):
        n_tiles = 0
    p_tile = scratch + i.to(tl.int64) * (BM * BN)
    b_count = tl.zeros([256], dtype=tl.int32)  # [256]
    while i < n_tiles:
        i_f, i_t = tile_of_block(i, tl.cdiv(P, BM), T, GROUP)
        o_m = tl.arange(0, BM)  # [BM]
        o_n = tl.arange(0, BN)  # [BN]
        o_t = i_t * BN + o_n  # [BN]
        m_f = i_f * BM + o_m < P  # [BM]
        b_f = tl.minimum(i_f * BM + o_m, P - 1)  # [BM]
        if HAS_MEMBERS:
            b_f = tl.load(members + b_f)  # [BM]
        b_z = product_tile(x, W, tl.minimum(o_t, B - 1), b_f, stride_x, stride_W, D, BM, BN, BD)  # [BM, BN]
        b_z = activation(b_z, b, scale, b_f[:, None], m_f[:, None], HAS_BIAS, HAS_SCALE)  # [BM, BN]
        tl.store(p_tile + o_m[:, None] * BN + o_n[None, :], b_z)
        # other threads read it by slices
        tl.debug_barrier()
        for i_s in range(0, BM, BS):
            o_s = i_s + tl.arange(0, BS)  # [BS]
            o_f = i_f * BM + o_s  # [BS]
            b_a = tl.load(p_tile + o_s[:, None] * BN + o_n[None, :])  # [BS, BN]
            m_a = (b_a > 0) & (o_f < P)[:, None] & (o_t < B)[None, :]  # [BS, BN]
            # lower tokens and features go first, larger values do: all three sort downwards
            b_value = b_a.to(tl.int32, bitcast=True)  # [BS, BN]
            b_token = (B - 1 - o_t)[None, :]  # [1, BN]
            b_feature = (P - 1 - o_f)[:, None]  # [BS, 1]
            b_top = b_value >> value_shift  # [BS, BN]
            m_token = (b_token >> token_shift) == token  # [1, BN]
            if is_last:
                m_place = m_token & ((b_feature >> feature_shift) >= feature)  # [BS, BN]
                m_place |= (b_token >> token_shift) > token  # [BS, BN]
                m_hit = m_a & ((b_top > value) | ((b_top == value) & m_place))  # [BS, BN]
                b_s = tl.minimum(o_f, P - 1)  # [BS]
                if HAS_MEMBERS:
                    b_s = tl.load(members + b_s)  # [BS]
                append(m_hit, b_a, o_t.to(tl.int64)[None, :] * F + b_s[:, None], values, keys, count, cap)
            else:
                m_place = m_token & ((b_feature >> feature_shift) == feature)  # [BS, BN]
                m_within = m_a & (b_top == value) & m_place  # [BS, BN]
                if tl.max(tl.max(m_within.to(tl.int32), axis=1), axis=0) > 0:
                    b_word = tl.where(in_value, b_value, tl.where(in_token, b_token, b_feature))  # [BS, BN]
                    b_digit = tl.reshape((b_word >> digit_shift) & 255, [BS * BN])  # [BS * BN]
                    b_count += tl.histogram(b_digit, 256, mask=tl.reshape(m_within, [BS * BN]))  # [256]
        tl.debug_barrier()
        i += tl.num_programs(0)
    tl.atomic_add(p_pass + tl.arange(0, 256), b_count.to(tl.int64), mask=b_count > 0, sem="relaxed")


def digits_of(length: int) -> int:
    """How many digits of 8 bits number `length` things from 0."""
    return triton.cdiv((length - 1).bit_length(), 8)


def refill_exactly_(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    members: torch.Tensor | None,
    n: int,
    tau: torch.Tensor,
    values: torch.Tensor,
    keys: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Replace a list that `append_above_` filled by the n largest entries, where these cannot be in it.

    That is so where count > cap, or where count < n and tau > 0; else nothing changes. Afterwards the first
    `count` slots hold, in any order, the min(n, number of positives) largest strictly positive entries of
    relu(x W^T + b) * scale over members (int64 [P], ascending; None for all), ties to the lower token, then
    feature. The slots behind them hold value 0 and key B * F.
    """
    check_encoder(x, W, b, scale)
    (B, D), F = x.shape, W.shape[0]
    if members is not None:
        check_vector("members", members, torch.int64)
    check_vector("tau", tau, torch.float32, 1)
    check_list(values, keys, count)
    if not 0 < n <= len(values):
        raise ValueError(f"n must be at least 1 and fit the {len(values)} slots, got {n}")
    P = F if members is None else len(members)
    if B == 0 or P == 0:
        return
    x = contiguous_rows(x)
    config = exact_fallback_config(architecture(x.device), x.dtype)
    BM, BN = config.kwargs["BM"], config.kwargs["BN"]
    programs = min(resident_programs(x.device), triton.cdiv(P, BM) * triton.cdiv(B, BN))
    token_digits, feature_digits = digits_of(B), digits_of(P)
    passes = VALUE_DIGITS.value + token_digits + feature_digits + 1
    histograms = torch.zeros(passes + 1, WIDTH.value, dtype=torch.int64, device=x.device)
    scratch = torch.empty(programs * BM * BN, dtype=torch.float32, device=x.device)
    for i_pass in range(passes):
        arguments = (x, W, b, scale, members, tau, values, keys, count, histograms, scratch, B, P, F, n, len(values))
        launch(
            refill_kernel,
            config,
            (programs,),
            (*arguments, i_pass, token_digits, feature_digits, x.stride(0), W.stride(0)),
            D=D,
            **given(bias=b, scale=scale, members=members),
        )

"""The columns whose bounds leave open whether they are among the largest, listed and computed in full on the device.

A column is among the `size` largest where its lower bound exceeds the (size + 1)-th largest upper one, and is not where
its upper bound lies below the size-th largest lower one. The others are listed, with room for ROOM of all, and their
sums over the tokens computed from operands in full: tile by tile, by as many programs as the GPU holds, which ask the
device how many there are. Where there is no room for them, or a bound is not finite, every column is computed by the
same launch. Nothing waits for the host. FLOPs: 2BdU for U columns. The sums are the bits that column_scores.py makes.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import activation, product_tile, tile_of_block
from sampled_sae.kernels.arguments import check_encoder, check_vector, contiguous_rows
from sampled_sae.kernels.column_scores import folded_tile, sum_of_tokens
from sampled_sae.kernels.configs import FOLD, SPECTRAL, architecture, given, launch, resident_programs, undecided_config
from sampled_sae.kernels.radix import PASSES, find_digits, picked, sort_bits

# of all columns, the share for which there is room
ROOM = 1 / 8
NOT_FINITE = tl.constexpr(0x7F800000)


@triton.jit
def list_undecided_kernel(low, high, of_low, of_high, known, statistics, columns, count, F, room, BLOCK: tl.constexpr):
    o_f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_f = o_f < F  # [BLOCK]
    least, _ = picked(of_low, PASSES - 1)
    greatest, _ = picked(of_high, PASSES - 1)
    b_l = sort_bits(tl.load(low + o_f, mask=m_f, other=0.0))  # [BLOCK]
    b_h = sort_bits(tl.load(high + o_f, mask=m_f, other=0.0))  # [BLOCK]
    m_sure = b_l > greatest  # [BLOCK]
    m_open = m_f & (b_l <= greatest) & (b_h >= least) & (b_l < b_h)  # [BLOCK]
    b_s = tl.load(known + o_f, mask=m_f, other=0.0)  # [BLOCK]
    tl.store(statistics + o_f, tl.where(m_sure, float("inf"), b_s), mask=m_f)
    b_open = m_open.to(tl.int32)  # [BLOCK]
    n_open = tl.sum(b_open, axis=0)
    n_bad = tl.sum((m_f & (b_h >= NOT_FINITE)).to(tl.int32), axis=0)
    if n_open + n_bad > 0:
        # one whose bound is not finite fills the room
        first = tl.atomic_add(count, n_bad.to(tl.int64) * (F + 1) + n_open, sem="relaxed")
        b_at = first + tl.cumsum(b_open, axis=0) - 1  # [BLOCK]
        tl.store(columns + b_at, o_f, mask=m_open & (b_at < room))


@triton.jit
def columns_to_compute(count, F, room):
    """How many columns are computed, and how many of these are listed: all, or none where every column is computed."""
    n = tl.load(count)
    return tl.where(n > room, F, n).to(tl.int32), tl.where(n > room, 0, n).to(tl.int32)


@triton.jit(do_not_specialize=["B"])
def undecided_partials_kernel(
    x,
    W,
    b,
    scale,
    columns,
    count,
    partials,
    B,
    F,
    room,
    stride_x,
    stride_W,
    D: tl.constexpr,
    SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    n, n_listed = columns_to_compute(count, F, room)
    T = tl.cdiv(B, BN)
    n_tiles = tl.cdiv(n, BM) * T
    i = tl.program_id(0)
    while i < n_tiles:
        i_c, i_t = tile_of_block(i, tl.cdiv(n, BM), T, GROUP)
        o_c = i_c * BM + tl.arange(0, BM)  # [BM]
        o_t = i_t * BN + tl.arange(0, BN)  # [BN]
        m_c = o_c < n  # [BM]
        b_c = tl.minimum(o_c, n - 1)  # [BM]
        b_f = tl.where(b_c < n_listed, tl.load(columns + b_c, mask=b_c < n_listed, other=0), b_c)  # [BM]
        b_a = product_tile(x, W, tl.minimum(o_t, B - 1), b_f, stride_x, stride_W, D, BM, BN, BD)  # [BM, BN]
        b_a = activation(b_a, b, scale, b_f[:, None], m_c[:, None], HAS_BIAS, HAS_SCALE)  # [BM, BN]
        b_a = tl.where((o_t < B)[None, :], b_a, 0.0)  # [BM, BN]
        tl.store(partials + i_t.to(tl.int64) * F + o_c, sum_of_tokens(b_a, SCORE), mask=m_c)
        i += tl.num_programs(0)


@triton.jit(do_not_specialize=["T"])
def settle_kernel(
    partials,
    columns,
    count,
    statistics,
    opened,
    T,
    F,
    room,
    CEIL_T: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    n, n_listed = columns_to_compute(count, F, room)
    first = tl.program_id(0) * BF
    if first == 0:
        tl.store(opened, n.to(tl.int64))
    if first < n:
        o_c = first + tl.arange(0, BF)  # [BF]
        m_c = o_c < n  # [BF]
        b_f = tl.where(o_c < n_listed, tl.load(columns + o_c, mask=o_c < n_listed, other=0), o_c)  # [BF]
        b_s = folded_tile(partials, tl.program_id(1).to(tl.int64), T, F, o_c, m_c, CEIL_T, BT, BF)  # [BF]
        tl.store(statistics + b_f, b_s, mask=m_c)


def settled_statistics(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    score: str,
    known: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics [F] whose `size` largest are those of the columns, and how many columns were computed, int64 [1].

    They are those of `column_statistics` for the columns that the bounds leave open, infinity for those that are surely
    among the largest, and `known` for the rest; where too many are open, those of `column_statistics` for all.

    Args:
        x, W, b, scale: x [B, d] and W [F, d] in full, fp32, B >= 1.
        score: "l2", "l2_squared" or "uniform".
        known: fp32 [F], lower bounds of the statistics.
        low, high: fp32 [F] >= 0, bounds of what the columns are ranked by, which rises with their statistics.
        size: from 1 to F - 1.
    """
    check_operands(x, W, b, scale, score)
    F = W.shape[0]
    for name, vector in (("known", known), ("low", low), ("high", high)):
        check_vector(name, vector, torch.float32, F)
    if not 0 < size < F:
        raise ValueError(f"size must be from 1 to {F - 1}, got {size}")
    room = room_of(F)
    of_low, of_high = find_digits(low, size), find_digits(high, size + 1)
    statistics = torch.empty(F, dtype=torch.float32, device=x.device)
    columns = torch.empty(room, dtype=torch.int32, device=x.device)
    count = torch.zeros(1, dtype=torch.int64, device=x.device)
    launch(
        list_undecided_kernel,
        SPECTRAL,
        lambda meta: (triton.cdiv(F, meta["BLOCK"]),),
        (low, high, of_low.histograms, of_high.histograms, known, statistics, columns, count, F, room),
    )
    return statistics, settle_(statistics, columns, count, x, W, b, scale, score)


def statistics_of(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    score: str,
    wanted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics [F], those of `column_statistics` for the columns `wanted`, bool [F], and how many were computed,
    int64 [1]: these alone, and 0 for the rest; or all where there is no room for a list.

    x, W, b, scale, score: as in `settled_statistics`.
    """
    check_operands(x, W, b, scale, score)
    F = W.shape[0]
    check_vector("wanted", wanted, torch.bool, F)
    room = room_of(F)
    place = torch.where(wanted, wanted.cumsum(0) - 1, room).clamp_(max=room)
    columns = torch.empty(room + 1, dtype=torch.int32, device=x.device)
    columns.scatter_(0, place, torch.arange(F, dtype=torch.int32, device=x.device))
    statistics = torch.zeros(F, dtype=torch.float32, device=x.device)
    count = wanted.sum(0, keepdim=True)
    return statistics, settle_(statistics, columns, count, x, W, b, scale, score)


def check_operands(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, scale: torch.Tensor | None, score: str
) -> None:
    if score not in ("l2", "l2_squared", "uniform"):
        raise ValueError(f"score must be l2, l2_squared or uniform, got {score!r}")
    if x.dtype != torch.float32:
        raise ValueError(f"x must be fp32, got {x.dtype}")
    check_encoder(x, W, b, scale)
    if len(x) == 0:
        raise ValueError("x must have a token, got 0")


def room_of(F: int) -> int:
    return max(1, int(ROOM * F))


def settle_(
    statistics: torch.Tensor,
    columns: torch.Tensor,
    count: torch.Tensor,
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    score: str,
) -> torch.Tensor:
    """Writes the statistics of the first `count`, int64 [1], of `columns`, or of all where these are more than there is
    room for; returns how many were computed, int64 [1]."""
    (B, D), F, x = x.shape, W.shape[0], contiguous_rows(x)
    room = room_of(F)
    config = undecided_config(architecture(x.device), D)
    T = triton.cdiv(B, config.kwargs["BN"])
    partials = torch.empty(T * F, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(F, config.kwargs["BM"]) * T
    launch(
        undecided_partials_kernel,
        config,
        # small tiles leave room for twice as many programs
        (min(tiles, resident_programs(x.device) * max(1, 8 // config.num_warps)),),
        (x, W, b, scale, columns, count, partials, B, F, room, x.stride(0), W.stride(0)),
        D=D,
        SCORE="l2" if score == "l2_squared" else score,
        **given(bias=b, scale=scale),
    )
    opened = torch.empty(1, dtype=torch.int64, device=x.device)
    launch(
        settle_kernel,
        FOLD,
        lambda meta: (triton.cdiv(F, meta["BF"]),),
        (partials, columns, count, statistics, opened, T, F, room),
        CEIL_T=triton.next_power_of_2(T),
    )
    return opened

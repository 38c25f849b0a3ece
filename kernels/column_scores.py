"""Column statistics of a = relu(x @ W.T + b) * scale, [B, F], which is never written.

FLOPs: 2BdF. Bytes, at the least: the operands, (B + F)d values, and S partials, 8 S F ceil(B/BN) written and
read back. Each block writes its partial sums and a second kernel adds them in a fixed order: no atomics, and
the same bits in every run. Rows past the end repeat the last row, so loads need no mask; tokens past the end
are dropped after the bias, which would turn a row of zeros into relu(b).
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import FAST_LOG, activation, product_tile, tile_of_block, times_log2
from sampled_sae.kernels.arguments import check_encoder, contiguous_rows
from sampled_sae.kernels.configs import FOLD, architecture, column_scores_config, launch

STATISTICS = {"l2": 1, "l2_squared": 1, "entropy": 2, "uniform": 1}
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sum_of_tokens(b_a, SCORE: tl.constexpr):
    """Of a tile [BM, BN], [BM]: what adds up to the score, entropy's aside."""
    if SCORE == "uniform":
        return tl.sum((b_a > 0).to(tl.float32), axis=1)
    else:
        return tl.sum(b_a * b_a, axis=1)


@triton.jit(do_not_specialize=["B"])
def column_partials_kernel(
    x,
    W,
    b,
    scale,
    partials,
    B,
    F,
    stride_x,
    stride_W,
    D: tl.constexpr,
    SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    FAST_LOG: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    T = tl.cdiv(B, BN)
    i_f, i_t = tile_of_block(tl.program_id(0), tl.cdiv(F, BM), T, GROUP)
    o_f = i_f * BM + tl.arange(0, BM)  # [BM]
    o_t = i_t * BN + tl.arange(0, BN)  # [BN]
    m_f = o_f < F  # [BM]
    b_f = tl.minimum(o_f, F - 1)  # [BM]
    b_a = product_tile(x, W, tl.minimum(o_t, B - 1), b_f, stride_x, stride_W, D, BM, BN, BD)  # [BM, BN]
    b_a = activation(b_a, b, scale, o_f[:, None], m_f[:, None], HAS_BIAS, HAS_SCALE)  # [BM, BN]
    b_a = tl.where((o_t < B)[None, :], b_a, 0.0)  # [BM, BN]

    p_s = partials + i_t.to(tl.int64) * F + o_f  # [BM]
    if SCORE == "entropy":
        tl.store(p_s, tl.sum(b_a, axis=1), mask=m_f)
        b_s = tl.sum(times_log2(b_a, FAST_LOG), axis=1) * LN_2  # [BM]
        tl.store(p_s + T.to(tl.int64) * F, b_s, mask=m_f)
    else:
        tl.store(p_s, sum_of_tokens(b_a, SCORE), mask=m_f)


@triton.jit
def folded_tile(partials, i_s, T, F, o_f, m_f, CEIL_T: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """The partials [S, T, F] of statistic i_s and the features o_f, summed over T in a fixed order: [BF]."""
    o_t = tl.arange(0, BT)  # [BT]
    b_s = tl.zeros([BT, BF], dtype=tl.float32)  # [BT, BF]
    for i in range(0, CEIL_T, BT):
        p_s = partials + (i_s * T + i + o_t)[:, None] * F + o_f[None, :]  # [BT, BF]
        b_s += tl.load(p_s, mask=(o_t < T - i)[:, None] & m_f[None, :], other=0.0)  # [BT, BF]
    return tl.sum(b_s, axis=0)


@triton.jit(do_not_specialize=["T"])
def fold_partials_kernel(partials, statistics, T, F, CEIL_T: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    i_s = tl.program_id(1).to(tl.int64)
    o_f = tl.program_id(0) * BF + tl.arange(0, BF)  # [BF]
    m_f = o_f < F  # [BF]
    b_s = folded_tile(partials, i_s, T, F, o_f, m_f, CEIL_T, BT, BF)  # [BF]
    tl.store(statistics + i_s * F + o_f, b_s, mask=m_f)


def fold_partials(partials: torch.Tensor, S: int, T: int, F: int) -> torch.Tensor:
    """partials, S*T*F as [S, T, F], summed over T in a fixed order: fp32 [S, F]."""
    statistics = torch.empty(S, F, dtype=torch.float32, device=partials.device)
    launch(
        fold_partials_kernel,
        FOLD,
        lambda meta: (triton.cdiv(F, meta["BF"]), S),
        (partials, statistics, T, F),
        CEIL_T=triton.next_power_of_2(T),
    )
    return statistics


def statistics_of(score: str) -> int:
    """S, the number of statistics that make `score`."""
    if score not in STATISTICS:
        raise ValueError(f"score must be one of {', '.join(STATISTICS)}, got {score!r}")
    return STATISTICS[score]


def column_statistics(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, score: str, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums over the tokens of x [B, d], already centred, for each row of W [F, d]: fp32 [S, F], no gradient.

    With `a = relu(x @ W.T + b) * scale` equivalent to `stack([a.square().sum(0)])` for "l2" and "l2_squared",
    `stack([a.sum(0), torch.xlogy(a, a).sum(0)])` for "entropy" and `stack([(a > 0).sum(0)])` for "uniform".
    """
    S = statistics_of(score)
    check_encoder(x, W, b, scale)
    (B, D), F = x.shape, W.shape[0]
    if B == 0 or F == 0:
        return x.new_zeros(S, F, dtype=torch.float32)
    x = contiguous_rows(x)

    config = column_scores_config(architecture(x.device), x.dtype, D)
    T = triton.cdiv(B, config.kwargs["BN"])
    partials = torch.empty(S * T * F, dtype=torch.float32, device=x.device)
    launch(
        column_partials_kernel,
        config,
        lambda meta: (triton.cdiv(F, meta["BM"]) * T,),
        (x, W, b, scale, partials, B, F, x.stride(0), W.stride(0)),
        D=D,
        SCORE="l2" if score == "l2_squared" else score,
        HAS_BIAS=b is not None,
        HAS_SCALE=scale is not None,
        FAST_LOG=FAST_LOG,
    )
    return fold_partials(partials, S, T, F)

"""Column statistics of a = relu(x @ W.T + b) * scale, [B, F], which is never written.

FLOPs: 2BdF. Bytes, at the least: the operands, (B + F)d values, and S partials, 8 S F ceil(B/BN) written and
read back. Each block writes its partial sums and a second kernel adds them in a fixed order: no atomics, and
the same bits in every run. Tokens past the end are dropped after the bias, which would turn a row of zeros into
relu(b). Operands come by tensor descriptors where the GPU has them and x and W fit (descriptors.py), else through
pointers, where rows past the end repeat the last row, so that loads need no mask.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import FAST_LOG, activation, product_tile, tile_of_block, times_log2
from sampled_sae.kernels.arguments import check_encoder, contiguous_rows
from sampled_sae.kernels.configs import (
    FOLD,
    architecture,
    column_scores_config,
    given,
    largest_fused_d,
    launch,
    multiprocessors,
)
from sampled_sae.kernels.descriptors import described, described_config
from sampled_sae.kernels.interpreter import dot_operand, loop_bound

STATISTICS = {"l2": 1, "l2_squared": 1, "entropy": 2, "uniform": 1}
LN_2 = tl.constexpr(0.6931471805599453)
# up to which d the kernel with descriptors is worth more than cuBLAS and a pass over its products
LARGEST_DESCRIBED_D = 4096


@triton.jit
def sum_of_tokens(b_a, SCORE: tl.constexpr):
    """Of a tile [BM, BN], [BM]: what adds up to the score, entropy's aside."""
    if SCORE == "uniform":
        return tl.sum((b_a > 0).to(tl.float32), axis=1)
    else:
        return tl.sum(b_a * b_a, axis=1)


@triton.jit
def store_partials(b_a, partials, i_t, T, F, o_f, m_f, SCORE: tl.constexpr, FAST_LOG: tl.constexpr):
    """The sums over the tokens of the activations b_a [BM, BN], tile i_t of T, to the partials [S, T, F]."""
    p_s = partials + i_t.to(tl.int64) * F + o_f  # [BM]
    if SCORE == "entropy":
        tl.store(p_s, tl.sum(b_a, axis=1), mask=m_f)
        b_s = tl.sum(times_log2(b_a, FAST_LOG), axis=1) * LN_2  # [BM]
        tl.store(p_s + T.to(tl.int64) * F, b_s, mask=m_f)
    else:
        tl.store(p_s, sum_of_tokens(b_a, SCORE), mask=m_f)


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
    store_partials(b_a, partials, i_t, T, F, o_f, m_f, SCORE, FAST_LOG)


@triton.jit(do_not_specialize=["B", "rounds"])
def described_partials_kernel(
    partials,
    x,
    W,
    b,
    scale,
    B,
    F,
    rounds,
    D: tl.constexpr,
    SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    FAST_LOG: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    """x and W are descriptors of tiles [BN, BD] and [BM, BD]. HAS_TAIL: not all tiles of tokens are full."""
    T = tl.cdiv(B, BN)
    n_f = tl.cdiv(F, BM)
    for i in tl.range(0, rounds, flatten=True):
        i_tile = tl.program_id(0) + tl.num_programs(0) * i
        # some programs have no tile in the last round, and make the last one again for nothing
        i_f, i_t = tile_of_block(tl.minimum(i_tile, T * n_f - 1), n_f, T, GROUP)
        b_a = tl.zeros([BM, BN], dtype=tl.float32)  # [BM, BN]
        for o_d in range(0, D, BD):
            b_W = W.load([i_f * BM, o_d])  # [BM, BD]
            b_x = x.load([i_t * BN, o_d])  # [BN, BD]
            b_a = tl.dot(dot_operand(b_W), tl.trans(dot_operand(b_x)), b_a, input_precision="ieee")  # [BM, BN]

        o_f = i_f * BM + tl.arange(0, BM)  # [BM]
        m_f = o_f < F  # [BM]
        b_a = activation(b_a, b, scale, o_f[:, None], m_f[:, None], HAS_BIAS, HAS_SCALE)  # [BM, BN]
        if HAS_TAIL:
            o_t = i_t * BN + tl.arange(0, BN)  # [BN]
            b_a = tl.where((o_t < B)[None, :], b_a, 0.0)  # [BM, BN]
        m_f = o_f < tl.where(i_tile < T * n_f, F, 0)  # [BM]
        store_partials(b_a, partials, i_t, T, F, o_f, m_f, SCORE, FAST_LOG)


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
    how = {
        "D": D,
        "SCORE": "l2" if score == "l2_squared" else score,
        **given(bias=b, scale=scale),
        "FAST_LOG": FAST_LOG,
    }
    arch = architecture(x.device)
    by_descriptors = described_config(arch, x, W)
    config = by_descriptors or column_scores_config(arch, x.dtype, D)
    BM, BN, BD = (config.kwargs[name] for name in ("BM", "BN", "BD"))
    T = triton.cdiv(B, BN)
    tiles = triton.cdiv(F, BM) * T
    partials = torch.empty(S * T * F, dtype=torch.float32, device=x.device)
    if by_descriptors:
        programs = min(multiprocessors(x.device), tiles)
        operands = described(x, BN, BD), described(W, BM, BD)
        rounds = loop_bound(triton.cdiv(tiles, programs))
        arguments = (partials, *operands, b, scale, B, F, rounds)
        launch(described_partials_kernel, config, (programs,), arguments, **how, HAS_TAIL=B % BN != 0)
    else:
        arguments = (x, W, b, scale, partials, B, F, x.stride(0), W.stride(0))
        launch(column_partials_kernel, config, lambda meta: (triton.cdiv(F, meta["BM"]) * T,), arguments, **how)
    return fold_partials(partials, S, T, F)


def is_fused(x: torch.Tensor, W: torch.Tensor) -> bool:
    """Whether one kernel for product and sums is worth more than cuBLAS and a pass over its products."""
    arch = architecture(x.device)
    most = largest_fused_d(arch, x.dtype)
    return x.shape[1] <= (max(most, LARGEST_DESCRIBED_D) if described_config(arch, x, W) else most)

"""Column statistics of a = relu(x @ W.T + b) * scale, [B, F], which is never written.

FLOPs: 2BdF. Bytes, at the least: the operands, (B + F)d values, and S partials, 8 S F ceil(B/BN) written and
read back. Features lie on M and tokens on N, so that the sum over tokens stays inside a thread up to a last
shuffle. Each block writes its partial sums and a second kernel adds them in a fixed order: no atomics, and
the same bits in every run. Rows past the end repeat the last row, so loads need no mask; tokens past the end
are dropped after the bias, which would turn a row of zeros into relu(b).
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from sampled_sae.kernels.configs import FOLD, architecture, column_scores_configs, launch
from sampled_sae.kernels.interpreter import INTERPRETED, dot_operand

STATISTICS = {"l2": 1, "l2_squared": 1, "entropy": 2, "uniform": 1}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAST_LOG = torch.version.hip is None and not INTERPRETED.value


@triton.jit
def tile_of_block(pid, n_features, n_tokens, GROUP: tl.constexpr):
    """Take GROUP feature tiles through all token tiles before the next group, whose weights stay in L2."""
    first = pid // (GROUP * n_tokens) * GROUP
    rows = tl.minimum(n_features - first, GROUP)
    at = pid % (GROUP * n_tokens)
    return first + at % rows, at // rows


@triton.jit
def times_log2(b_a, FAST_LOG: tl.constexpr):
    """a * log2(a), 0 at 0: the clamp is the smallest normal number, below it the fast log gives -inf."""
    b_z = tl.maximum(b_a, 1.1754943508222875e-38)
    if FAST_LOG:
        return b_a * libdevice.fast_log2f(b_z)
    else:
        return b_a * tl.log2(b_z)


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
    o_d = tl.arange(0, BD)  # [BD]
    m_f = o_f < F  # [BM]
    m_t = o_t < B  # [BN]
    p_W = W + tl.minimum(o_f, F - 1).to(tl.int64)[:, None] * stride_W + o_d[None, :]  # [BM, BD]
    p_x = x + tl.minimum(o_t, B - 1).to(tl.int64)[None, :] * stride_x + o_d[:, None]  # [BD, BN]

    b_a = tl.zeros([BM, BN], dtype=tl.float32)  # [BM, BN]
    for i in range(0, D, BD):
        if D % BD == 0:
            b_W = tl.load(p_W)  # [BM, BD]
            b_x = tl.load(p_x)  # [BD, BN]
        else:
            b_W = tl.load(p_W, mask=o_d[None, :] < D - i, other=0.0)  # [BM, BD]
            b_x = tl.load(p_x, mask=o_d[:, None] < D - i, other=0.0)  # [BD, BN]
        b_a = tl.dot(dot_operand(b_W), dot_operand(b_x), b_a, input_precision="ieee")  # [BM, BN]
        p_W += BD
        p_x += BD

    if HAS_BIAS:
        b_a += tl.load(b + o_f, mask=m_f, other=0.0).to(tl.float32)[:, None]  # [BM, BN]
    b_a = tl.maximum(b_a, 0.0, propagate_nan=tl.PropagateNan.ALL)  # [BM, BN]
    if HAS_SCALE:
        b_a *= tl.load(scale + o_f, mask=m_f, other=0.0).to(tl.float32)[:, None]  # [BM, BN]
    b_a = tl.where(m_t[None, :], b_a, 0.0)  # [BM, BN]

    p_s = partials + i_t.to(tl.int64) * F + o_f  # [BM]
    if SCORE == "entropy":
        tl.store(p_s, tl.sum(b_a, axis=1), mask=m_f)
        LN_2: tl.constexpr = 0.6931471805599453
        b_s = tl.sum(times_log2(b_a, FAST_LOG), axis=1) * LN_2  # [BM]
        tl.store(p_s + T.to(tl.int64) * F, b_s, mask=m_f)
    elif SCORE == "uniform":
        tl.store(p_s, tl.sum((b_a > 0).to(tl.float32), axis=1), mask=m_f)
    else:
        tl.store(p_s, tl.sum(b_a * b_a, axis=1), mask=m_f)


@triton.jit(do_not_specialize=["T"])
def fold_partials_kernel(partials, statistics, T, F, CEIL_T: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    i_s = tl.program_id(1).to(tl.int64)
    o_f = tl.program_id(0) * BF + tl.arange(0, BF)  # [BF]
    o_t = tl.arange(0, BT)  # [BT]
    m_f = o_f < F  # [BF]

    b_s = tl.zeros([BT, BF], dtype=tl.float32)  # [BT, BF]
    for i in range(0, CEIL_T, BT):
        p_s = partials + (i_s * T + i + o_t)[:, None] * F + o_f[None, :]  # [BT, BF]
        b_s += tl.load(p_s, mask=(o_t < T - i)[:, None] & m_f[None, :], other=0.0)  # [BT, BF]
    tl.store(statistics + i_s * F + o_f, tl.sum(b_s, axis=0), mask=m_f)


def column_statistics(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, score: str, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums over the tokens of x [B, d], already centred, for each row of W [F, d]: fp32 [S, F], no gradient.

    With `a = relu(x @ W.T + b) * scale` equivalent to `stack([a.square().sum(0)])` for "l2" and "l2_squared",
    `stack([a.sum(0), torch.xlogy(a, a).sum(0)])` for "entropy" and `stack([(a > 0).sum(0)])` for "uniform".
    """
    if score not in STATISTICS:
        raise ValueError(f"score must be one of {', '.join(STATISTICS)}, got {score!r}")
    if x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[1]:
        raise ValueError(f"x [B, d] and W [F, d] expected, got {list(x.shape)} and {list(W.shape)}")
    if x.dtype != W.dtype or x.dtype not in DTYPES:
        raise ValueError(f"x and W must both be fp32, bf16 or fp16, got {x.dtype} and {W.dtype}")
    if W.stride(1) != 1:
        raise ValueError("the weights of each feature must be contiguous: pass W_enc.t() of a feature-major W_enc")
    (B, D), F = x.shape, W.shape[0]
    for name, vector in (("b", b), ("scale", scale)):
        if vector is not None and (vector.shape != (F,) or not vector.is_contiguous()):
            raise ValueError(f"{name} must be contiguous, [{F}], got {list(vector.shape)}")
    S = STATISTICS[score]
    if B == 0 or F == 0:
        return x.new_zeros(S, F, dtype=torch.float32)
    if x.stride(1) != 1:
        x = x.contiguous()

    configs = column_scores_configs(architecture(x.device), x.dtype, D)
    T = triton.cdiv(B, min(config.kwargs["BN"] for config in configs))
    partials = torch.empty(S * T * F, dtype=torch.float32, device=x.device)
    statistics = torch.empty(S, F, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        config = launch(
            column_partials_kernel,
            configs,
            ("F", "D", "SCORE"),
            lambda meta: (triton.cdiv(F, meta["BM"]) * triton.cdiv(B, meta["BN"]),),
            (x, W, b, scale, partials, B, F, x.stride(0), W.stride(0)),
            D=D,
            SCORE="l2" if score == "l2_squared" else score,
            HAS_BIAS=b is not None,
            HAS_SCALE=scale is not None,
            FAST_LOG=FAST_LOG,
        )
        T = triton.cdiv(B, config.kwargs["BN"])
        launch(
            fold_partials_kernel,
            (FOLD,),
            (),
            lambda meta: (triton.cdiv(F, meta["BF"]), S),
            (partials, statistics, T, F),
            CEIL_T=triton.next_power_of_2(T),
        )
    return statistics

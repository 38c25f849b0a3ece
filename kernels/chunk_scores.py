"""Column statistics of a = relu(z + b) * scale for a chunk of features whose product z [B, C] is in memory.

Bytes: z once, 4BC, and S partials, 8 S C ceil(B / (BT * STEPS)), written and read back; a few FLOPs an entry,
so bound by memory. Features lie along the lanes, which makes loads of z contiguous; a block adds STEPS tiles of
BT tokens entry by entry and sums over tokens once. Partials are folded in a fixed order, as in
column_scores.py: no atomics, and the same bits in every run.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import FAST_LOG, activation, times_log2
from sampled_sae.kernels.arguments import check_products
from sampled_sae.kernels.column_scores import LN_2, fold_partials, statistics_of
from sampled_sae.kernels.configs import architecture, chunk_scores_config, given, launch


@triton.jit(do_not_specialize=["B"])
def chunk_partials_kernel(
    z,
    b,
    scale,
    partials,
    B,
    stride_z,
    stride_s,
    stride_t,
    C,
    SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    FAST_LOG: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    STEPS: tl.constexpr,
):
    i_t = tl.program_id(1)
    o_f = tl.program_id(0) * BF + tl.arange(0, BF)  # [BF]
    m_f = o_f < C  # [BF]

    b_s = tl.zeros([BT, BF], dtype=tl.float32)  # [BT, BF]
    b_l = tl.zeros([BT, BF], dtype=tl.float32)  # [BT, BF]
    for i in range(STEPS):
        o_t = (i_t * STEPS + i) * BT + tl.arange(0, BT)  # [BT]
        m_t = (o_t < B)[:, None]  # [BT, 1]
        p_z = z + o_t.to(tl.int64)[:, None] * stride_z + o_f[None, :]  # [BT, BF]
        b_z = tl.load(p_z, mask=m_t & m_f[None, :], other=0.0)  # [BT, BF]
        b_a = activation(b_z, b, scale, o_f[None, :], m_f[None, :], HAS_BIAS, HAS_SCALE)  # [BT, BF]
        b_a = tl.where(m_t, b_a, 0.0)  # [BT, BF]
        if SCORE == "entropy":
            b_s += b_a  # [BT, BF]
            b_l += times_log2(b_a, FAST_LOG)  # [BT, BF]
        elif SCORE == "uniform":
            b_s += (b_a > 0).to(tl.float32)  # [BT, BF]
        else:
            b_s += b_a * b_a  # [BT, BF]

    p_s = partials + i_t.to(tl.int64) * stride_t + o_f  # [BF]
    tl.store(p_s, tl.sum(b_s, axis=0), mask=m_f)
    if SCORE == "entropy":
        tl.store(p_s + stride_s, tl.sum(b_l, axis=0) * LN_2, mask=m_f)


def chunk_partials(n_tokens: int, n_features: int, score: str, device: torch.device) -> torch.Tensor:
    """Room for the partial sums of so many tokens and features: fp32 [S, T, F]."""
    config = chunk_scores_config(architecture(device))
    T = triton.cdiv(n_tokens, config.kwargs["BT"] * config.kwargs["STEPS"])
    return torch.empty(statistics_of(score), T, n_features, dtype=torch.float32, device=device)


def write_partials_(
    z: torch.Tensor, b: torch.Tensor | None, scale: torch.Tensor | None, score: str, partials: torch.Tensor
) -> None:
    """Partial sums of `a = relu(z + b) * scale`, of the product z [B, C], to C features' part of `chunk_partials`."""
    check_products(z, b, scale)
    B, C = z.shape
    if partials.shape[2] != C or partials.stride(2) != 1:
        raise ValueError(f"partials must be [S, T, {C}] of contiguous features, got {list(partials.shape)}")
    if B == 0 or C == 0:
        return
    launch(
        chunk_partials_kernel,
        chunk_scores_config(architecture(z.device)),
        lambda meta: (triton.cdiv(C, meta["BF"]), partials.shape[1]),
        (z, b, scale, partials, B, z.stride(0), partials.stride(0), partials.stride(1), C),
        SCORE="l2" if score == "l2_squared" else score,
        **given(bias=b, scale=scale),
        FAST_LOG=FAST_LOG,
    )


def folded(partials: torch.Tensor) -> torch.Tensor:
    """What `write_partials_` has filled, chunk by chunk, summed over T in a fixed order: fp32 [S, F]."""
    S, T, F = partials.shape
    return fold_partials(partials, S, T, F) if partials.numel() else partials.new_zeros(S, F)


def chunk_statistics(z: torch.Tensor, b: torch.Tensor | None, scale: torch.Tensor | None, score: str) -> torch.Tensor:
    """`column_statistics` for `a = relu(z + b) * scale` from the product z [B, C] itself: fp32 [S, C]."""
    check_products(z, b, scale)
    partials = chunk_partials(*z.shape, score, z.device)
    write_partials_(z, b, scale, score, partials)
    return folded(partials)

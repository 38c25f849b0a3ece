"""A reconstruction x_hat = raw + bias, its squared error for each token, and the way back, one pass each.

Bytes: forward raw and target read and x_hat written, 12 an element in fp32; backward x_hat and target read (and what
else x_hat receives) and the gradient written, 12, and 2 more for a copy of 16 bits; a few FLOPs an element, so bound
by memory. Forward a program has whole tokens, so that a sum stays in it. Backward it walks over tokens with a stripe of
columns, whose sums are the gradient of the bias: partial sums, folded in a fixed order.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.arguments import check_copy, check_matrix, check_vector, contiguous_rows
from sampled_sae.kernels.column_scores import fold_partials
from sampled_sae.kernels.configs import ERRORS, ERRORS_BACKWARD, given, launch, of_family
from sampled_sae.kernels.interpreter import rounded


@triton.jit(do_not_specialize=["B"])
def errors_kernel(
    raw,
    bias,
    target,
    x_hat,
    errors,
    B,
    stride_raw,
    stride_target,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    o_d = tl.arange(0, BD)  # [BD]
    m_t = o_t < B  # [BT]
    b_s = tl.zeros([BT, BD], dtype=tl.float32)  # [BT, BD]
    for i in range(0, D, BD):
        m_x = m_t[:, None] & (o_d[None, :] < D - i)  # [BT, BD]
        b_x = tl.load(raw + o_t[:, None] * stride_raw + i + o_d[None, :], mask=m_x, other=0.0)  # [BT, BD]
        if HAS_BIAS:
            b_x += tl.load(bias + i + o_d, mask=o_d < D - i, other=0.0)[None, :]
        p_t = target + o_t[:, None] * stride_target + i + o_d[None, :]  # [BT, BD]
        b_r = b_x - tl.load(p_t, mask=m_x, other=0.0).to(tl.float32)  # [BT, BD]
        tl.store(x_hat + o_t[:, None] * D + i + o_d[None, :], b_x, mask=m_x)
        # past the end of a row the bias is 0 as well
        b_s += b_r * b_r
    tl.store(errors + o_t, tl.sum(b_s, axis=1), mask=m_t)


@triton.jit(do_not_specialize=["B"])
def errors_backward_kernel(
    x_hat,
    target,
    d_errors,
    d_x_hat,
    out,
    copy,
    partials,
    B,
    stride_d_x_hat,
    stride_target,
    D: tl.constexpr,
    HAS_ERRORS: tl.constexpr,
    HAS_X_HAT: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STEPS: tl.constexpr,
):
    i_t = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)  # [BD]
    m_d = (o_d < D)[None, :]  # [1, BD]
    b_s = tl.zeros([BT, BD], dtype=tl.float32)  # [BT, BD]
    for i in range(STEPS):
        o_t = (i_t * STEPS + i) * BT + tl.arange(0, BT)  # [BT]
        m_x = (o_t < B)[:, None] & m_d  # [BT, BD]
        b_g = tl.zeros([BT, BD], dtype=tl.float32)  # [BT, BD]
        if HAS_ERRORS:
            b_x = tl.load(x_hat + o_t[:, None] * D + o_d[None, :], mask=m_x, other=0.0)  # [BT, BD]
            p_t = target + o_t[:, None] * stride_target + o_d[None, :]  # [BT, BD]
            b_r = b_x - tl.load(p_t, mask=m_x, other=0.0).to(tl.float32)  # [BT, BD]
            b_g += 2.0 * tl.load(d_errors + o_t, mask=o_t < B, other=0.0)[:, None] * b_r
        if HAS_X_HAT:
            b_g += tl.load(d_x_hat + o_t[:, None] * stride_d_x_hat + o_d[None, :], mask=m_x, other=0.0)
        tl.store(out + o_t[:, None] * D + o_d[None, :], b_g, mask=m_x)
        if HAS_COPY:
            tl.store(copy + o_t[:, None] * D + o_d[None, :], rounded(b_g, copy.dtype.element_ty), mask=m_x)
        b_s += b_g
    tl.store(partials + i_t * D + o_d, tl.sum(b_s, axis=0), mask=o_d < D)


def squared_errors(
    raw: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(raw + bias, its squared error for each token): fp32 [B, d] and [B], no gradient.

    raw [B, d] and bias [d] are fp32, target [B, d] is fp32, bf16 or fp16. Equivalent to
    `(x_hat := raw + bias, (x_hat - target.float()).square().sum(1))`.
    """
    check_pair("raw", raw, target)
    B, D = raw.shape
    if bias is not None:
        check_vector("bias", bias, torch.float32, D)
    x_hat, errors = raw.new_empty(B, D), raw.new_empty(B)
    if B == 0 or D == 0:
        return x_hat, errors.zero_()
    raw, target = contiguous_rows(raw), contiguous_rows(target)
    launch(
        errors_kernel,
        of_family(ERRORS, raw.device),
        lambda meta: (triton.cdiv(B, meta["BT"]),),
        (raw, bias, target, x_hat, errors, B, raw.stride(0), target.stride(0)),
        D=D,
        HAS_BIAS=bias is not None,
    )
    return x_hat, errors


def squared_errors_backward(
    d_errors: torch.Tensor | None,
    d_x_hat: torch.Tensor | None,
    x_hat: torch.Tensor,
    target: torch.Tensor,
    copy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What raw receives and what the bias does, fp32 [B, d] and [d], of what errors and x_hat received, fp32 or None.

    `copy`, contiguous [B, d], is written with the first of them, rounded to its dtype, bf16 or fp16. Equivalent to
    `(d := 2 * d_errors[:, None] * (x_hat - target.float()) + d_x_hat, d.sum(0))`.
    """
    check_pair("x_hat", x_hat, target)
    B, D = x_hat.shape
    if d_errors is not None:
        check_vector("d_errors", d_errors, torch.float32, B)
    if d_x_hat is not None:
        check_pair("d_x_hat", d_x_hat, target)
    check_copy(copy, x_hat)
    out = x_hat.new_empty(B, D)
    if B == 0 or D == 0:
        return out, x_hat.new_zeros(D)
    x_hat, target = x_hat.contiguous(), contiguous_rows(target)
    d_x_hat = None if d_x_hat is None else contiguous_rows(d_x_hat)
    config = of_family(ERRORS_BACKWARD, x_hat.device)
    T = triton.cdiv(B, config.kwargs["BT"] * config.kwargs["STEPS"])
    partials = torch.empty(T * D, dtype=torch.float32, device=x_hat.device)
    launch(
        errors_backward_kernel,
        config,
        lambda meta: (triton.cdiv(D, meta["BD"]), T),
        (
            *(x_hat, target, d_errors, d_x_hat, out, copy, partials, B),
            *(0 if d_x_hat is None else d_x_hat.stride(0), target.stride(0)),
        ),
        D=D,
        **given(errors=d_errors, x_hat=d_x_hat, copy=copy),
    )
    return out, fold_partials(partials, 1, T, D)[0]


def check_pair(name: str, matrix: torch.Tensor, target: torch.Tensor) -> None:
    """Raise unless `matrix` is fp32 [B, d] and target a matrix of that shape."""
    if matrix.ndim != 2 or matrix.dtype != torch.float32:
        raise ValueError(f"{name} must be a matrix in fp32, got {matrix.dtype} {list(matrix.shape)}")
    check_matrix("target", target)
    if target.shape != matrix.shape:
        raise ValueError(f"target must be {list(matrix.shape)} as {name}, got {list(target.shape)}")

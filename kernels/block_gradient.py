"""The gradient that a block of kept activations [B, P] hands on: masked, scaled, rounded and summed in one pass.

Bytes: gradient and block read, 8 an entry, and the result written, 2 or 4; a few FLOPs, so bound by memory. A program
walks over tokens with a stripe of columns, as backward in reconstruction.py, whose configuration it takes: partial
sums, folded in a fixed order.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.arguments import check_features, contiguous_rows
from sampled_sae.kernels.column_scores import fold_partials
from sampled_sae.kernels.configs import ERRORS_BACKWARD, launch, of_family
from sampled_sae.kernels.interpreter import rounded


@triton.jit(do_not_specialize=["B"])
def block_gradient_kernel(
    grad,
    block,
    scale,
    out,
    partials,
    B,
    P,
    stride_grad,
    HAS_SCALE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STEPS: tl.constexpr,
):
    i_t = tl.program_id(1).to(tl.int64)
    o_p = tl.program_id(0) * BD + tl.arange(0, BD)  # [BD]
    m_p = (o_p < P)[None, :]  # [1, BD]
    b_scale = 1.0
    if HAS_SCALE:
        b_scale = tl.load(scale + o_p, mask=o_p < P, other=0.0).to(tl.float32)[None, :]  # [1, BD]
    b_s = tl.zeros([BT, BD], dtype=tl.float32)  # [BT, BD]
    for i in range(STEPS):
        o_t = (i_t * STEPS + i) * BT + tl.arange(0, BT)  # [BT]
        m_g = (o_t < B)[:, None] & m_p  # [BT, BD]
        b_a = tl.load(block + o_t[:, None] * P + o_p[None, :], mask=m_g, other=0.0)  # [BT, BD]
        b_g = tl.load(grad + o_t[:, None] * stride_grad + o_p[None, :], mask=m_g, other=0.0)  # [BT, BD]
        b_g = tl.where(b_a > 0, b_g * b_scale, 0.0)  # [BT, BD]
        tl.store(out + o_t[:, None] * P + o_p[None, :], rounded(b_g, out.dtype.element_ty), mask=m_g)
        b_s += b_g
    tl.store(partials + i_t * P + o_p, tl.sum(b_s, axis=0), mask=o_p < P)


def block_gradient(
    grad: torch.Tensor, block: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [B, P] fp32 where the kept block [B, P] fp32 is positive, times scale [P] fp32, and 0 elsewhere.

    Returns it in `dtype`, fp32, bf16 or fp16, and its sums over tokens before it was rounded, fp32 [P]. Equivalent to
    `(g := torch.where(block > 0, grad * scale, 0)).to(dtype), g.sum(0)`.
    """
    if block.ndim != 2 or block.dtype != torch.float32 or not block.is_contiguous():
        raise ValueError(f"block must be contiguous fp32 [B, P], got {block.dtype} {list(block.shape)}")
    check_features(None, scale, block.shape[1])
    if grad.shape != block.shape or grad.dtype != torch.float32:
        raise ValueError(f"grad must be fp32 {list(block.shape)} as block, got {grad.dtype} {list(grad.shape)}")
    (B, P), grad = block.shape, contiguous_rows(grad)
    out = block.new_empty(B, P, dtype=dtype)
    if B == 0 or P == 0:
        return out, block.new_zeros(P)
    config = of_family(ERRORS_BACKWARD, block.device)
    T = triton.cdiv(B, config.kwargs["BT"] * config.kwargs["STEPS"])
    partials = torch.empty(T * P, dtype=torch.float32, device=block.device)
    launch(
        block_gradient_kernel,
        config,
        lambda meta: (triton.cdiv(P, meta["BD"]), T),
        (grad, block, scale, out, partials, B, P, grad.stride(0)),
        HAS_SCALE=scale is not None,
    )
    return out, fold_partials(partials, 1, T, P)[0]

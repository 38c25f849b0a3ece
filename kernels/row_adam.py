"""One step of Adam on the rows of a weight [F, d]: clip, project, moments, weights, unit rows and copy in one kernel.

Bytes for each parameter of a row: weight and two moments, read and written (24 in fp32, 16 with bf16 moments), its
gradient read, its copy written; about 20 FLOPs. Bound by memory: a program holds whole rows in registers, so that
the sums over d of projection and renormalisation read nothing twice. "dense" moves all F rows and looks up where the
gradient of each is listed, so no dense gradient is written; "lazy" and "decayed" move the rows of the list alone.
Step, clip factor and, where it is a tensor, lr are read on the device: nothing waits, and a CUDA graph may replay
the step.
Moments decay by 1 - alpha with alpha = 1 - beta rounded once: beta rounded to fp32 puts v off by 1.3e-5 of it.
"""

import math

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.arguments import COPIES, check_matrix, check_vector, contiguous_rows, rows_are_contiguous
from sampled_sae.kernels.configs import LONGEST_ADAM_ROW, architecture, given, launch, row_adam_config
from sampled_sae.kernels.interpreter import rounded

MODES = ("dense", "lazy", "decayed")
MOMENTS = (torch.float32, torch.bfloat16)


@triton.jit
def one_minus_power(step, log_beta):
    """1 - beta ** step to fp32's accuracy, also where the power is close to 1."""
    # what is below changes nothing, and its powers overflow
    x = tl.maximum(step * log_beta, -100.0)
    series = 1.0
    for i in tl.static_range(8, 1, -1):
        series = 1.0 + series * x * (1.0 / i)
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def random_bits(seed, step, b_r, BR: tl.constexpr, BD: tl.constexpr):
    """32 bits for each element, which depend on seed, step, row and column alone; one Philox call gives four."""
    if BD < 4:
        b_bits, _, _, _ = tl.philox(seed, b_r[:, None], tl.arange(0, BD)[None, :], step, 0)  # [BR, BD]
        return b_bits
    o_q = tl.arange(0, BD // 4)  # [BD / 4]
    b_0, b_1, b_2, b_3 = tl.philox(seed, b_r[:, None], o_q[None, :], step, 0)  # [BR, BD / 4]
    return tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [BR, BD])


@triton.jit
def stored_moment(b_m, b_bits, dtype: tl.constexpr):
    """fp32 as it is, or to bf16 at random: 16 bits are added below the last that is kept, then cut off."""
    if dtype == tl.float32:
        return b_m
    b_u = (b_m.to(tl.uint32, bitcast=True) + (b_bits & 0xFFFF)) & 0xFFFF0000
    # the carry would turn a NaN of all ones into a zero
    return tl.where(b_m == b_m, b_u.to(tl.float32, bitcast=True), b_m).to(dtype)


@triton.jit(do_not_specialize=["R", "seed"])
def row_adam_kernel(
    weight,
    exp_avg,
    exp_avg_sq,
    grad,
    features,
    positions,
    last,
    copy,
    step,
    factor,
    R,
    stride_weight,
    stride_grad,
    stride_copy,
    lr,
    lr_scalar,
    alpha1,
    alpha2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    seed,
    D: tl.constexpr,
    LAZY: tl.constexpr,
    PROJECT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_FEATURES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_LAST: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    o_d = tl.arange(0, BD)  # [BD]
    m_r = o_r < R  # [BR]
    m_d = (o_d < D)[None, :]  # [1, BD]
    b_f = o_r  # [BR], the row in weight
    b_t = o_r  # [BR], the row in grad
    m_t = m_r  # [BR]
    if HAS_FEATURES:
        b_f = tl.load(features + o_r, mask=m_r, other=0)  # [BR]
    if HAS_POSITIONS:
        b_t = tl.load(positions + o_r, mask=m_r, other=-1).to(tl.int64)  # [BR]
        m_t = b_t >= 0  # [BR]
    p_g = grad + b_t[:, None] * stride_grad + o_d[None, :]  # [BR, BD]
    b_g = tl.load(p_g, mask=m_t[:, None] & m_d, other=0.0).to(tl.float32)  # [BR, BD]
    if LAZY:
        m_r = m_r & (tl.max((b_g != 0).to(tl.int32), axis=1) > 0)  # [BR]
    m_w = m_r[:, None] & m_d  # [BR, BD]

    p_w = weight + b_f[:, None] * stride_weight + o_d[None, :]  # [BR, BD]
    b_w = tl.load(p_w, mask=m_w, other=0.0)  # [BR, BD]
    if HAS_FACTOR:
        b_g *= tl.load(factor)
    if PROJECT:
        b_g -= tl.sum(b_g * b_w, axis=1)[:, None] * b_w
    b_g += weight_decay * b_w

    o_m = b_f[:, None] * D + o_d[None, :]  # [BR, BD]
    b_step = tl.load(step)
    if LR_ON_DEVICE:
        lr_scalar = tl.load(lr)
    rate = lr_scalar / one_minus_power(b_step, log_beta1)
    scale = 1.0 / tl.sqrt(one_minus_power(b_step, log_beta2))
    b_bits = 0
    if exp_avg.dtype.element_ty == tl.bfloat16 or exp_avg_sq.dtype.element_ty == tl.bfloat16:
        b_bits = random_bits(seed, b_step.to(tl.int32), b_f.to(tl.int32), BR, BD)  # [BR, BD]
    if HAS_LAST:
        b_missed = b_step - 1.0 - tl.load(last + b_f, mask=m_r, other=0).to(tl.float32)  # [BR]
        # each warp reads for itself: none may write before all have
        tl.debug_barrier()
        tl.store(last + b_f, tl.zeros([BR], tl.int32) + b_step.to(tl.int32), mask=m_r)

    # one moment after the other: the longest rows leave no registers for both
    b_m = tl.load(exp_avg + o_m, mask=m_w, other=0.0).to(tl.float32)  # [BR, BD]
    if HAS_LAST:
        b_m *= tl.exp(b_missed * log_beta1)[:, None]
    # not a + alpha * (g - a), which loses g beside a large a where beta is 0
    b_m = alpha1 * b_g + (b_m - alpha1 * b_m)
    tl.store(exp_avg + o_m, stored_moment(b_m, b_bits, exp_avg.dtype.element_ty), mask=m_w)
    # 1 past the end of a row: 0 / 0 there would reach the norm if eps is 0
    b_v = tl.load(exp_avg_sq + o_m, mask=m_w, other=1.0).to(tl.float32)  # [BR, BD]
    if HAS_LAST:
        b_v *= tl.exp(b_missed * log_beta2)[:, None]
    b_v = alpha2 * b_g * b_g + (b_v - alpha2 * b_v)
    tl.store(exp_avg_sq + o_m, stored_moment(b_v, b_bits >> 16, exp_avg_sq.dtype.element_ty), mask=m_w)

    b_w -= rate * b_m / (tl.sqrt(b_v) * scale + eps)
    if RENORMALIZE:
        b_norm = tl.sqrt(tl.sum(b_w * b_w, axis=1))  # [BR]
        # not tl.maximum, which drops a NaN
        b_w /= tl.where(b_norm < 1e-12, 1e-12, b_norm)[:, None]
    tl.store(p_w, b_w, mask=m_w)
    if HAS_COPY:
        p_c = copy + b_f[:, None] * stride_copy + o_d[None, :]  # [BR, BD]
        tl.store(p_c, rounded(b_w, copy.dtype.element_ty), mask=m_w)


def row_adam_(
    weight: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    features: torch.Tensor | None,
    step: torch.Tensor,
    *,
    factor: torch.Tensor | None,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    mode: str,
    last: torch.Tensor | None = None,
    project: bool = False,
    renormalize: bool = False,
    copy: torch.Tensor | None = None,
    seed: int = 0,
) -> None:
    """Adam in place on weight, fp32 [F, d] or [F], and its moments, fp32 or bf16, from the gradient of some rows.

    grad, [T, d] or [T], holds the rows `features`, int64 [T], each once, or all rows where that is None; it is
    multiplied by `factor`. step counts from 1. lr is a number, or fp32 with one element on the device. With `project`
    the part along the (unit) row of weight is removed from the gradient, then weight_decay * weight added; with
    `renormalize` the new row is made a unit. What is written to weight is rounded into `copy`, fp16 or bf16, as well.
    bf16 moments are rounded up or down at random, with the same bits for the same seed and step.

    mode "dense": all F rows, as `torch.optim.Adam` on `zeros(F, d).index_copy(0, features, grad)`.
    mode "lazy": the rows whose gradient is not all zero; the others, moments included, stay as they are.
    mode "decayed": as "lazy", and the moments are first multiplied by beta ** (step - 1 - last) for the steps that
    the row missed; last, int32 [F], zero at first, is set to step. The moments are then those of "dense".
    """
    others = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad": grad, "features": features, "step": step}
    others |= {"factor": factor, "lr": lr if isinstance(lr, torch.Tensor) else None, "last": last, "copy": copy}
    check_arguments(mode, weight, others)
    if weight.ndim == 1:
        weight, exp_avg, exp_avg_sq, grad = (t.unsqueeze(1) for t in (weight, exp_avg, exp_avg_sq, grad))
        copy = None if copy is None else copy.unsqueeze(1)
    (F, D), lazy = weight.shape, mode != "dense"
    R = len(grad) if lazy else F
    if R == 0 or D == 0:
        return
    grad = contiguous_rows(grad)
    on_device, number = (lr, 0.0) if isinstance(lr, torch.Tensor) else (None, float(lr))
    positions = None
    if features is not None and not lazy:
        places = torch.arange(len(grad), dtype=torch.int32, device=weight.device)
        positions = torch.full((F,), -1, dtype=torch.int32, device=weight.device).index_copy_(0, features, places)
        features = None
    launch(
        row_adam_kernel,
        row_adam_config(architecture(weight.device), D),
        lambda meta: (triton.cdiv(R, meta["BR"]),),
        (
            *(weight, exp_avg, exp_avg_sq, grad, features, positions, last, copy, step, factor),
            *(R, weight.stride(0), grad.stride(0), 0 if copy is None else copy.stride(0)),
            *(on_device, number, 1.0 - beta1, 1.0 - beta2, log_of(beta1), log_of(beta2)),
            *(float(eps), float(weight_decay), seed),
        ),
        D=D,
        LAZY=lazy,
        PROJECT=project,
        RENORMALIZE=renormalize,
        **given(features=features, positions=positions, last=last, copy=copy, factor=factor),
        LR_ON_DEVICE=on_device is not None,
    )


def log_of(beta: float) -> float:
    """ln beta; for 0 a number whose multiples are as good as -inf, but 0 times it is 0."""
    return math.log(max(beta, 1e-300))


def check_arguments(mode: str, weight: torch.Tensor, others: dict[str, torch.Tensor | None]) -> None:
    """Raise unless all tensors are such as the kernel reads, on one device."""
    grad, features, last, copy = (others[name] for name in ("grad", "features", "last", "copy"))
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if weight.ndim not in (1, 2) or weight.dtype != torch.float32 or not rows_are_contiguous(as_matrix(weight)):
        raise ValueError(f"weight must be fp32 [F, d] or [F] with contiguous rows, got {described(weight)}")
    if as_matrix(weight).shape[1] > LONGEST_ADAM_ROW:
        raise ValueError(f"weight must have rows of at most {LONGEST_ADAM_ROW} elements, got {described(weight)}")
    for name in ("exp_avg", "exp_avg_sq"):
        moment = others[name]
        if moment.shape != weight.shape or moment.dtype not in MOMENTS or not moment.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, fp32 or bf16, {list(weight.shape)} as weight, got {described(moment)}"
            )
    if grad.ndim != weight.ndim or grad.shape[1:] != weight.shape[1:]:
        raise ValueError(f"grad must be {['T', *weight.shape[1:]]} as weight, got {described(grad)}")
    check_matrix("grad", as_matrix(grad))
    if features is not None:
        check_vector("features", features, torch.int64, len(grad))
    elif len(grad) != len(weight):
        raise ValueError(f"features must be given where grad has {len(grad)} of {len(weight)} rows")
    for name in ("step", "factor", "lr"):
        scalar = others[name]
        if scalar is not None and (scalar.numel() != 1 or scalar.dtype != torch.float32):
            raise ValueError(f"{name} must be fp32 with one element, got {described(scalar)}")
    if (last is not None) != (mode == "decayed"):
        raise ValueError(f"last must be given in mode 'decayed' and in no other, got mode {mode!r} and last={last}")
    if last is not None:
        check_vector("last", last, torch.int32, len(weight))
    fits = copy is None or (copy.shape == weight.shape and copy.dtype in COPIES)
    if not fits or (copy is not None and not rows_are_contiguous(as_matrix(copy))):
        raise ValueError(f"copy must be bf16 or fp16 {list(weight.shape)} with contiguous rows, got {described(copy)}")
    for name, tensor in others.items():
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name} must be on {weight.device} as weight, got {tensor.device}")


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(1) if tensor.ndim == 1 else tensor


def described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} of strides {tensor.stride()}"

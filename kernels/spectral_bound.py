"""A number that the largest singular value of a matrix is proven not to exceed, kept on the device.

For G = X^T X / t, with t no less than the trace, sigma^2 = t |G|, and |G|^4 = |G^4| <= ||G^4||_F, whose fourth root is
seldom twice what it bounds. G and its squares are bfloat16 products of matrices that `rounded_rows` has rounded, so
that in spectral norms

    |G| <= |V_1| + e_1 + g,    |V_1|^2 <= |V_2| + e_2 + h_1,    |V_2|^2 <= ||V_2 V_2^T||_F + h_2

where V_1 is G rounded and V_2 is V_1 V_1^T rounded, e what each rounding changed, and g, h what sums are rounded by:
sums of n terms move no entry by more than n SUMS times the norms of its two factors, and the matrix of these has the
spectral norm of n SUMS times the sum of their squares. Bytes: three norms of each row read, once.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.arguments import check_vector
from sampled_sae.kernels.configs import SPECTRAL, launch
from sampled_sae.kernels.rounded_rows import LEAST, MARGIN, SUMS


@triton.jit
def sum_of_squares(values, errors, N, HAS_ERRORS: tl.constexpr, BLOCK: tl.constexpr):
    """Of values [N], or of values + errors."""
    b_s = tl.zeros([BLOCK], dtype=tl.float32)  # [BLOCK]
    start = tl.program_id(0)  # 0, of a type that may grow
    while start < N:
        o_v = start + tl.arange(0, BLOCK)  # [BLOCK]
        b_v = tl.load(values + o_v, mask=o_v < N, other=0.0)  # [BLOCK]
        if HAS_ERRORS:
            b_v += tl.load(errors + o_v, mask=o_v < N, other=0.0)  # [BLOCK]
        b_s += b_v * b_v
        start += BLOCK
    return tl.sum(b_s, axis=0)


@triton.jit(do_not_specialize=["N"])
def trace_kernel(norms, errors, trace, N, BLOCK: tl.constexpr):
    b_t = sum_of_squares(norms, errors, N, True, BLOCK)
    tl.store(trace, b_t)
    tl.store(trace + 1, 1.0 / b_t)


@triton.jit(do_not_specialize=["N", "L"])
def spectral_bound_kernel(
    trace,
    norms_1,
    errors_1,
    norms_2,
    errors_2,
    norms_3,
    left,
    bound,
    N,
    L,
    D: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b_t = tl.load(trace)
    ROUNDED: tl.constexpr = SUMS * D
    b_h = sum_of_squares(norms_2, errors_2, D, True, BLOCK) * ROUNDED
    b_s = tl.sqrt(sum_of_squares(norms_3, norms_3, D, False, BLOCK)) + b_h
    b_h = sum_of_squares(norms_1, errors_1, D, True, BLOCK) * ROUNDED
    b_s = tl.sqrt(b_s) + tl.sqrt(sum_of_squares(errors_2, errors_2, D, False, BLOCK)) + b_h
    b_n = N.to(tl.float32)
    b_s = tl.sqrt(b_s) + tl.sqrt(sum_of_squares(errors_1, errors_1, D, False, BLOCK)) + b_n * SUMS
    # what is lost of products that are too small
    b_s = (tl.sqrt(b_s * b_t) + tl.sqrt(b_n * D) * LEAST) * MARGIN
    if HAS_LEFT:
        b_s += tl.sqrt(sum_of_squares(left, left, L, False, BLOCK)) * MARGIN
    tl.store(bound, b_s)
    tl.store(bound + 1, tl.sqrt(b_t) * MARGIN)


def trace_bound(norms: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """(sum of (norms + errors)^2, its inverse), fp32 [2]: of fp32 [N], no less than the norms of N rows."""
    check_vector("norms", norms, torch.float32)
    check_vector("errors", errors, torch.float32, len(norms))
    trace = torch.empty(2, dtype=torch.float32, device=norms.device)
    launch(trace_kernel, SPECTRAL, (1,), (norms, errors, trace, len(norms)))
    return trace


def spectral_bound(
    trace: torch.Tensor,
    norms_1: torch.Tensor,
    errors_1: torch.Tensor,
    norms_2: torch.Tensor,
    errors_2: torch.Tensor,
    norms_3: torch.Tensor,
    n: int,
    left: torch.Tensor | None = None,
) -> torch.Tensor:
    """(no less than the largest singular value of X, no less than its Frobenius norm), fp32 [2].

    Args:
        trace: `trace_bound` of the rows of X.
        norms_1, errors_1: fp32 [D], what `rounded_rows` gave for X^T X / trace or X X^T / trace, sums of n terms.
        norms_2, errors_2: fp32 [D], the same for the product of its values with their transpose.
        norms_3: fp32 [D], of the rows of the product of the second values with their transpose.
        left: fp32 [L], norms of the rows of what is added to X before its largest singular value is bounded.
    """
    check_vector("trace", trace, torch.float32, 2)
    D = len(norms_3)
    vectors = {"norms_1": norms_1, "errors_1": errors_1, "norms_2": norms_2, "errors_2": errors_2, "norms_3": norms_3}
    for name, vector in vectors.items():
        check_vector(name, vector, torch.float32, D)
    if left is not None:
        check_vector("left", left, torch.float32)
    bound = torch.empty(2, dtype=torch.float32, device=trace.device)
    arguments = (trace, *vectors.values(), left, bound, n, 0 if left is None else len(left))
    launch(spectral_bound_kernel, SPECTRAL, (1,), arguments, D=D, HAS_LEFT=left is not None)
    return bound

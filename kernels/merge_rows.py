"""The k largest strictly positive entries of each token from a stream of feature chunks, ties to the lower feature.

One program a row of a chunk, which is read once: 4C bytes. What stands in the row so far is the lower bound of the
search on the bits, and a row with nothing above it leaves at once. Newcomers are written behind those that stay, so
that features ascend. With a spread, by which the product may be off, entries count as what they are at least: the
smallest of the k is then what the k-th largest activation is at least.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import activation, spread_of
from sampled_sae.kernels.arguments import (
    Spread,
    check_block,
    check_vector,
    listed_or_first,
    spread_arguments,
)
from sampled_sae.kernels.configs import MERGED_ROWS, given, launch, merge_config
from sampled_sae.kernels.radix import is_kept, sort_bits
from sampled_sae.kernels.token_topk import search_cut, search_end

MAX_K = 512
MAX_CHUNK = MERGED_ROWS[-1][0]


@triton.jit
def chunk_row(
    z,
    b,
    scale,
    norms,
    errors,
    of_norms,
    of_errors,
    of_bias,
    i_t,
    o_c,
    C,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
):
    """relu(z + b) * scale in the columns o_c of token i_t, or what that is at least; 0 past the row's end."""
    m_c = o_c < C  # as o_c
    b_z = tl.load(z + o_c, mask=m_c, other=0.0)  # as o_c
    if HAS_SPREAD:
        b_z -= spread_of(norms, errors, of_norms, of_errors, of_bias, i_t, i_t >= 0, o_c, m_c)  # as o_c
    return activation(b_z, b, scale, o_c, m_c, HAS_BIAS, HAS_SCALE)


@triton.jit(do_not_specialize=["first"])
def merge_rows_kernel(
    best_values,
    best_features,
    z,
    features,
    b,
    scale,
    norms,
    errors,
    of_norms,
    of_errors,
    of_bias,
    needed,
    C,
    k,
    first,
    HAS_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    HAS_NEEDED: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    if HAS_NEEDED and tl.load(needed) == 0:
        return
    i_t = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BK)  # [BK]
    o_c = tl.arange(0, BC)  # [BC]
    m_k = o_k < k  # [BK]
    best_values += i_t * k
    best_features += i_t * k
    z += i_t * C
    b_best = tl.load(best_values + o_k, mask=m_k, other=0.0)  # [BK]
    b_u = sort_bits(b_best)  # [BK]
    b_w = sort_bits(
        chunk_row(
            z, b, scale, norms, errors, of_norms, of_errors, of_bias, i_t, o_c, C, HAS_BIAS, HAS_SCALE, HAS_SPREAD
        )
    )  # [BC]
    # 0 while a slot is unused, else the k-th best so far, to which a newcomer loses ties
    least = tl.min(tl.where(m_k, b_u, 0x7FFFFFFF))
    if tl.max(b_w) <= least:
        return

    b_f = tl.load(best_features + o_k, mask=m_k, other=0)  # [BK]
    cut, n_cut, n_above = search_cut(b_u, b_w, k, tl.maximum(least, 1), True)
    end_stay = k
    end_enter = C
    if n_cut > k:
        ties = k - n_above
        end_stay = search_end(b_u, o_k, cut, ties, BK)
        end_enter = search_end(b_w, o_c, cut, ties - tl.sum((b_u == cut).to(tl.int32)), BC)
    b_stay = is_kept(b_u, o_k, cut, end_stay).to(tl.int32)  # [BK]
    # entries move to lower slots of their row: all of it must have been read
    tl.debug_barrier()
    o_slot = tl.cumsum(b_stay) - 1  # [BK]
    tl.store(best_values + o_slot, b_best, mask=b_stay > 0)
    tl.store(best_features + o_slot, b_f, mask=b_stay > 0)

    # newcomers are read again, from cache: a scan and a scatter of a whole chunk would take most registers
    taken = tl.sum(b_stay)
    for i in range(0, BC, BS):
        o_s = i + tl.arange(0, BS)  # [BS]
        b_a = chunk_row(
            z, b, scale, norms, errors, of_norms, of_errors, of_bias, i_t, o_s, C, HAS_BIAS, HAS_SCALE, HAS_SPREAD
        )  # [BS]
        b_enter = is_kept(sort_bits(b_a), o_s, cut, end_enter).to(tl.int32)  # [BS]
        n_enter = tl.sum(b_enter)
        if n_enter > 0:
            o_new = taken + tl.cumsum(b_enter) - 1  # [BS]
            if HAS_FEATURES:
                b_new = tl.load(features + o_s, mask=b_enter > 0, other=0).to(tl.int32)  # [BS]
            else:
                b_new = first + o_s  # [BS]
            tl.store(best_values + o_new, b_a, mask=b_enter > 0)
            tl.store(best_features + o_new, b_new, mask=b_enter > 0)
        taken += n_enter


def merge_rows_(
    best_values: torch.Tensor,
    best_features: torch.Tensor,
    z: torch.Tensor,
    features: int | torch.Tensor,
    b: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    spread: Spread | None = None,
    needed: torch.Tensor | None = None,
) -> None:
    """Merge a chunk of features into the k best so far of each token, in place; repeated, TopK over all features.

    best_values [B, k] fp32 and best_features [B, k] int32 are in ascending feature order; unused slots, at the
    end, hold 0 and 2**31 - 1. z [B, C] is the raw product of the chunk, taken as relu(z + b) * scale. `features`
    are those of its columns, int64 [C], ascending, or the first of C in a row; all are higher than those merged
    before. Ties go to the lower feature. Equivalent to the k largest strictly positive of both together.
    With a `spread` z may be off by it, and entries count as what they are at least. Where `needed`, int64 [1], is 0,
    nothing is done.
    """
    check_block(z, b, scale)
    B, C = z.shape
    if best_values.ndim != 2 or best_values.shape[0] != B or best_values.dtype != torch.float32:
        raise ValueError(f"best_values must be fp32 [{B}, k], got {best_values.dtype} {list(best_values.shape)}")
    if best_features.shape != best_values.shape or best_features.dtype != torch.int32:
        shape = list(best_values.shape)
        raise ValueError(f"best_features must be int32 {shape}, got {best_features.dtype} {list(best_features.shape)}")
    if not (best_values.is_contiguous() and best_features.is_contiguous()):
        raise ValueError("best_values and best_features must be contiguous")
    k = best_values.shape[1]
    if C > MAX_CHUNK or k > MAX_K:
        raise ValueError(f"chunks of at most {MAX_CHUNK} features and k of at most {MAX_K}, got {C} and {k}")
    listed, first = listed_or_first(features, C)
    of_spread = spread_arguments(spread, B, C)
    if needed is not None:
        check_vector("needed", needed, torch.int64, 1)
    if z.numel() == 0 or k == 0:
        return
    launch(
        merge_rows_kernel,
        merge_config(C),
        (B,),
        (best_values, best_features, z, listed, b, scale, *of_spread, needed, C, k, first),
        **given(features=listed, bias=b, scale=scale, spread=spread, needed=needed),
        BK=triton.next_power_of_2(k),
    )

"""The n largest strictly positive entries of a whole block, ties to the lower flat index: exact, without a sort.

A radix selection (radix.py) finds the cut, the counts of each span around it say how many entries equal to the
cut are kept before each program, and one more kernel writes. For a block of N entries: 4N bytes read by each of
four passes, 4N written by the first, 4N read and written by the last kernel (and 2N for a copy): 32N to 34N.
No step waits for another program, none for the host.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.arguments import check_block, check_vector
from sampled_sae.kernels.configs import given, launch
from sampled_sae.kernels.interpreter import rounded
from sampled_sae.kernels.radix import cut_of_span, find_cut, is_kept, sort_bits, span_of_program
from sampled_sae.kernels.token_topk import keep_rows_


@triton.jit
def write_pool_kernel(
    z,
    copy,
    least,
    histograms,
    counts,
    N,
    HAS_COPY: tl.constexpr,
    HAS_LEAST: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
):
    start, length = span_of_program(N, TILES, BLOCK)
    cut, end, _, _ = cut_of_span(z, histograms, counts, N, True, TILES, BLOCK, SPANS)
    b_least = tl.full([BLOCK], float("inf"), dtype=tl.float32)  # [BLOCK]
    for i in range(0, TILES):
        o_v = i * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        m_v = o_v < length  # [BLOCK]
        p_z = z + start + o_v  # [BLOCK]
        b_z = tl.load(p_z, mask=m_v, other=0.0)  # [BLOCK]
        b_z = tl.where(is_kept(sort_bits(b_z), o_v, cut, end), b_z, 0.0)  # [BLOCK]
        tl.store(p_z, b_z, mask=m_v)
        if HAS_COPY:
            tl.store(copy + start + o_v, rounded(b_z, copy.dtype.element_ty), mask=m_v)
        if HAS_LEAST:
            b_least = tl.where((b_z > 0) & (b_z < b_least), b_z, b_least)  # [BLOCK]
    if HAS_LEAST:
        # the bits of positive numbers sort as they do
        tl.atomic_min(least, tl.min(b_least, axis=0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def write_indices_kernel(
    scores, indices, histograms, counts, N, TILES: tl.constexpr, BLOCK: tl.constexpr, SPANS: tl.constexpr
):
    start, length = span_of_program(N, TILES, BLOCK)
    cut, end, before, _ = cut_of_span(scores, histograms, counts, N, False, TILES, BLOCK, SPANS)
    # small tiles, for the scan takes many registers
    SMALL: tl.constexpr = BLOCK // 4
    for i in range(0, 4 * TILES):
        o_v = i * SMALL + tl.arange(0, SMALL)  # [SMALL]
        m_v = o_v < length  # [SMALL]
        b_u = sort_bits(tl.load(scores + start + o_v, mask=m_v, other=0.0))  # [SMALL]
        b_keep = m_v & is_kept(b_u, o_v, cut, end)  # [SMALL]
        b_rank = tl.cumsum(b_keep.to(tl.int32))  # [SMALL]
        tl.store(indices + (before + b_rank - 1), start + o_v, mask=b_keep)
        before += tl.sum(b_keep.to(tl.int32))


@triton.jit(do_not_specialize=["n", "n_tokens"])
def write_entries_kernel(
    values,
    keys,
    kept_values,
    tokens,
    features,
    histograms,
    counts,
    N,
    n,
    n_tokens,
    n_features,
    NARROW: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
):
    start, length = span_of_program(N, TILES, BLOCK)
    cut, end, before, total = cut_of_span(values, histograms, counts, N, True, TILES, BLOCK, SPANS)
    # small tiles, for the scan takes many registers
    SMALL: tl.constexpr = BLOCK // 4
    for i in range(0, 4 * TILES):
        o_v = i * SMALL + tl.arange(0, SMALL)  # [SMALL]
        m_v = o_v < length  # [SMALL]
        b_v = tl.load(values + start + o_v, mask=m_v, other=0.0)  # [SMALL]
        b_keep = m_v & is_kept(sort_bits(b_v), o_v, cut, end)  # [SMALL]
        o_n = before + tl.cumsum(b_keep.to(tl.int32)) - 1  # [SMALL]
        b_key = tl.load(keys + start + o_v, mask=b_keep, other=0)  # [SMALL]
        if NARROW:
            b_key = b_key.to(tl.int32)  # [SMALL]
        tl.store(kept_values + o_n, b_v, mask=b_keep)
        tl.store(tokens + o_n, (b_key // n_features).to(tl.int32), mask=b_keep)
        tl.store(features + o_n, (b_key % n_features).to(tl.int32), mask=b_keep)
        before += tl.sum(b_keep.to(tl.int32))

        # the grid covers all n slots as well: each program fills the unused ones at its own positions
        o_n = start + i * SMALL + tl.arange(0, SMALL)  # [SMALL]
        m_n = (o_n >= total) & (o_n < n)  # [SMALL]
        tl.store(kept_values + o_n, 0.0, mask=m_n)
        tl.store(tokens + o_n, n_tokens, mask=m_n)
        tl.store(features + o_n, n_features, mask=m_n)


def keep_largest_(
    z: torch.Tensor,
    n: int,
    b: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
    least: torch.Tensor | None = None,
) -> None:
    """Overwrite z [B, P], a raw product, by a = relu(z + b) * scale, the n largest strictly positive entries alone.

    Ties go to the lower token, then to the lower column. `copy` [B, P] is written with the result in its own dtype,
    `least`, fp32 [1] and positive, lowered to the smallest entry that is kept, NaN aside.
    Equivalent to `a * mask_of_n_largest(a)`; no gradient.
    """
    check_block(z, b, scale, copy)
    if least is not None:
        check_vector("least", least, torch.float32, 1)
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if n == 0 or n >= z.numel():
        keep_rows_(z, min(n, z.shape[1]), b, scale, copy)
        if least is not None and z.numel():
            torch.minimum(least, torch.where(z > 0, z, torch.inf).amin(), out=least)
        return
    cut = find_cut(z, n, b, scale)
    launch(
        write_pool_kernel,
        cut.config,
        cut.programs(z.numel()),
        (z, copy, None if least is None else least.view(torch.int32), cut.histograms, cut.counts, z.numel()),
        **given(copy=copy, least=least),
        TILES=cut.TILES,
    )


def largest_indices(scores: torch.Tensor, size: int) -> torch.Tensor:
    """The min(size, F) largest of scores [F] fp32 >= 0, int64, ascending; ties to the lower index.

    Equivalent to `scores.sort(descending=True, stable=True).indices[:size].sort().values`.
    """
    check_vector("scores", scores, torch.float32)
    if size < 0:
        raise ValueError(f"size must be at least 0, got {size}")
    F = scores.numel()
    if size >= F:
        return torch.arange(F, device=scores.device)
    indices = torch.empty(size, dtype=torch.int64, device=scores.device)
    if size == 0:
        return indices
    cut = find_cut(scores, size)
    arguments = (scores, indices, cut.histograms, cut.counts, F)
    launch(write_indices_kernel, cut.config, cut.programs(F), arguments, TILES=cut.TILES)
    return indices


def compact_largest(
    values: torch.Tensor, keys: torch.Tensor, n: int, n_tokens: int, n_features: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The n largest strictly positive of values [N] fp32 >= 0, in the order they stand; ties to the lower position.

    keys [N] int64 hold token * n_features + feature, ascending (any key where the value is 0). Returns values
    fp32, tokens int32 and features int32, each [n]; unused slots at the end hold 0, n_tokens and n_features.
    """
    check_vector("values", values, torch.float32)
    if keys.dtype != torch.int64 or keys.shape != values.shape or not keys.is_contiguous():
        raise ValueError(f"keys must be contiguous int64 {list(values.shape)}, got {keys.dtype} {list(keys.shape)}")
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    N = values.numel()
    kept_values = torch.empty(n, dtype=torch.float32, device=values.device)
    tokens = torch.empty(n, dtype=torch.int32, device=values.device)
    features = torch.empty(n, dtype=torch.int32, device=values.device)
    if n == 0 or N == 0:
        return kept_values.zero_(), tokens.fill_(n_tokens), features.fill_(n_features)
    cut = find_cut(values, min(n, N))
    launch(
        write_entries_kernel,
        cut.config,
        cut.programs(max(n, N)),
        (values, keys, kept_values, tokens, features, cut.histograms, cut.counts, N, n, n_tokens, n_features),
        NARROW=n_tokens * n_features < 2**31,
        TILES=cut.TILES,
    )
    return kept_values, tokens, features

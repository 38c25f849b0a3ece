"""Sums over segments of a list of entries of weight * source row: weight gradients, and the sums of `gather_decode`.

Each entry reads its row of source once, d * itemsize bytes, for 2d FLOPs, and each row of the result is written
once: bound by memory. A program is one warp with as much of d as it loads at 16 bytes a lane: rows are added
inside threads, and BE are in flight. Tiles of d are the slow axis of the grid: all programs pass over one stripe
of source before the next, so rows that are used often come from L2.
Most features have a few entries, some one for every token. The list is therefore divided into pieces of PIECE
entries: at most one segment goes on from a piece into the next. A first kernel sums the rest of that segment in each
piece, a second each segment to the end of its first piece and adds the partial sums of the rest. No program sums
more than PIECE entries, grids follow from n, R and PIECE alone, n / PIECE rows of partial sums are all the memory it
takes, and the order of summation is fixed by the list: no atomics, and the same bits in every run.
"""

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.arguments import check_matrix, check_vector, contiguous_rows
from sampled_sae.kernels.configs import architecture, given, launch, segment_sum_config


@triton.jit
def sum_of_rows(
    weights,
    indices,
    order,
    start,
    end,
    source,
    stride_source,
    o_d,
    D: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum of weights_i * source[indices_i] over the entries from start to end, and that of weights_i in BE parts."""
    o_e = tl.arange(0, BE)  # [BE]
    b_out = tl.zeros([BD], dtype=tl.float32)  # [BD]
    b_s = tl.zeros([BE], dtype=tl.float32)  # [BE]
    while start < end:
        m_e = o_e < end - start  # [BE]
        b_e = start + o_e  # [BE]
        if HAS_ORDER:
            b_e = tl.load(order + b_e, mask=m_e, other=0)  # [BE]
        b_w = tl.load(weights + b_e, mask=m_e, other=0.0)  # [BE]
        b_i = tl.load(indices + b_e, mask=m_e, other=0).to(tl.int64)  # [BE]
        p_x = source + b_i[:, None] * stride_source + o_d[None, :]  # [BE, BD]
        b_x = tl.load(p_x, mask=m_e[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)  # [BE, BD]
        b_out += tl.sum(b_w[:, None] * b_x, axis=0)  # [BD]
        b_s += b_w  # [BE]
        start += BE
    return b_out, b_s


@triton.jit(do_not_specialize=["R"])
def rests_kernel(
    weights,
    indices,
    order,
    ends,
    source,
    partials,
    partial_sums,
    R,
    stride_source,
    D: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
    PIECE: tl.constexpr,
):
    i_p = tl.program_id(0)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    first = i_p * PIECE
    # the last segment that starts no later than the piece, or the first one
    i_r = tl.full([], 0, tl.int32)
    after = R + 1
    while after - i_r > 1:
        middle = (i_r + after) // 2
        is_before = tl.load(ends + middle) <= first
        i_r = tl.where(is_before, middle, i_r)
        after = tl.where(is_before, after, middle)
    start = tl.load(ends + i_r)
    # in the unused slots at the end there is no segment: i_r is R
    end = tl.load(ends + tl.minimum(i_r + 1, R))
    # a segment that starts with the piece is not the rest of one
    if (start < first) & (first < end):
        end = tl.minimum(end, first + PIECE)
        b_out, b_s = sum_of_rows(
            weights, indices, order, first, end, source, stride_source, o_d, D, HAS_ORDER, BE, BD
        )  # [BD], [BE]
        tl.store(partials + i_p.to(tl.int64) * D + o_d, b_out, mask=o_d < D)
        if HAS_SUMS:
            tl.store(partial_sums + i_p, tl.sum(b_s, axis=0), mask=tl.program_id(1) == 0)


@triton.jit
def segments_kernel(
    weights,
    indices,
    order,
    ends,
    source,
    bias,
    partials,
    partial_sums,
    rows,
    out,
    sums,
    norms,
    stride_source,
    D: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
    PIECE: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    o_p = tl.arange(0, BE)  # [BE]
    m_d = o_d < D  # [BD]
    start = tl.load(ends + i_r)
    end = tl.load(ends + i_r + 1)
    i_p = start // PIECE + 1
    end_first = tl.minimum(end, i_p * PIECE)
    b_out, b_s = sum_of_rows(
        weights, indices, order, start, end_first, source, stride_source, o_d, D, HAS_ORDER, BE, BD
    )  # [BD], [BE]
    while i_p * PIECE < end:
        m_p = (i_p + o_p) * PIECE < end  # [BE]
        p_p = partials + (i_p + o_p).to(tl.int64)[:, None] * D + o_d[None, :]  # [BE, BD]
        b_out += tl.sum(tl.load(p_p, mask=m_p[:, None] & m_d[None, :], other=0.0), axis=0)  # [BD]
        if HAS_SUMS:
            b_s += tl.load(partial_sums + i_p + o_p, mask=m_p, other=0.0)  # [BE]
        i_p += BE
    if HAS_BIAS:
        b_out += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    if HAS_NORMS:
        # past the end of a row it is 0
        p_n = norms + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_r
        tl.store(p_n, tl.sqrt(tl.sum(b_out * b_out, axis=0)))
    if HAS_ROWS:
        i_r = tl.load(rows + i_r)
    tl.store(out + i_r * D + o_d, b_out, mask=m_d)
    if HAS_SUMS:
        tl.store(sums + i_r, tl.sum(b_s, axis=0), mask=tl.program_id(1) == 0)


def sum_segments(
    weights: torch.Tensor,
    indices: torch.Tensor,
    order: torch.Tensor | None,
    ends: torch.Tensor,
    source: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor | None,
    out: torch.Tensor,
    sums: torch.Tensor | None,
    norm: torch.Tensor | None = None,
) -> None:
    """Write sum of weights_i * source[indices_i] (+ bias) over each segment to `out`, that of weights_i to `sums`, and
    the norm of all of `out` to `norm`, without another pass over it.

    Segment r has the entries from ends[r] to ends[r + 1], counted in `order` if there is one, and is written to row
    rows[r], else r. The arguments are not checked.
    """
    n, R, D = len(weights), len(ends) - 1, out.shape[1]
    if R == 0 or D == 0:
        if norm is not None:
            norm.zero_()
        return
    source = contiguous_rows(source)
    config = segment_sum_config(architecture(source.device), source.dtype)
    PIECE = config.kwargs["PIECE"]
    pieces = triton.cdiv(n, PIECE)
    partials = torch.empty(pieces * D, dtype=torch.float32, device=source.device)
    partial_sums = torch.empty(pieces, dtype=torch.float32, device=source.device)
    if pieces > 1:
        launch(
            rests_kernel,
            config,
            lambda meta: (pieces, triton.cdiv(D, meta["BD"])),
            (weights, indices, order, ends, source, partials, partial_sums, R, source.stride(0)),
            D=D,
            **given(order=order, sums=sums),
        )
    stripes, norms = triton.cdiv(D, config.kwargs["BD"]), None
    if norm is not None:
        norms = torch.empty(R * stripes, dtype=torch.float32, device=source.device)
    launch(
        segments_kernel,
        config,
        (R, stripes),
        (weights, indices, order, ends, source, bias, partials, partial_sums, rows, out, sums, norms, source.stride(0)),
        D=D,
        **given(order=order, bias=bias, rows=rows, sums=sums, norms=norms),
    )
    if norms is not None:
        torch.linalg.vector_norm(norms, out=norm)


def feature_order(features: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of entries by feature, int32 [n], and where those of each row end in it, int32 [R + 1], from 0.

    `rows`, int64 [R], ascending, holds every feature that occurs in `features`, int32 [n], but for that of unused
    slots, which is larger than all of them and comes last. Equivalent to
    `(features.argsort(stable=True), cumsum([0, *((features == r).sum() for r in rows)]))`.
    """
    check_vector("features", features, torch.int32)
    check_vector("rows", rows, torch.int64)
    by_feature, order = torch.sort(features, stable=True)
    ends = torch.searchsorted(by_feature, rows.int(), right=True, out_int32=True)
    return order.int(), torch.nn.functional.pad(ends, (1, 0))


def segment_sum(
    weights: torch.Tensor,
    tokens: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    source: torch.Tensor,
    rows: torch.Tensor | None,
    n_rows_out: int,
    with_sums: bool = False,
    norm: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums over each segment's entries of weights_i * source[tokens_i], fp32 [n_rows_out, d], and of weights_i.

    Segment r has the entries order[ends[r]] to order[ends[r + 1]] (int32 [n] and [R + 1], of `feature_order`) of
    weights, fp32 [n], and tokens, int32 [n]. Its sum goes to row rows[r], int64 [R], each once, or to row r where
    rows are not given; other rows are zero. The sums of weights, fp32 [n_rows_out], come with `with_sums`, else
    None. `norm`, fp32 0-dim, receives that of the first result. No gradient. Equivalent to
    `stack([weights[i] @ source[tokens[i]] for i in segments])`.
    """
    check_vector("weights", weights, torch.float32)
    check_vector("tokens", tokens, torch.int32, len(weights))
    check_vector("order", order, torch.int32, len(weights))
    check_vector("ends", ends, torch.int32)
    check_matrix("source", source)
    R, D = len(ends) - 1, source.shape[1]
    if rows is not None:
        check_vector("rows", rows, torch.int64, R)
    elif n_rows_out != R:
        raise ValueError(f"n_rows_out must be {R}, one for each segment, where rows are not given: got {n_rows_out}")
    make = torch.empty if rows is None else torch.zeros
    out = make(n_rows_out, D, dtype=torch.float32, device=source.device)
    sums = make(n_rows_out, dtype=torch.float32, device=source.device) if with_sums else None
    sum_segments(weights, tokens, order, ends, source, None, rows, out, sums, norm)
    return out, sums

"""The encoder product chunk by chunk of features, in memory that serves again.

2BdF FLOP; the activations of a chunk (about 4 MB) never leave the cache. Larger batches are taken in blocks of tokens:
a chunk of all of them would be too few features wide for a product at full rate.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ...support.argument_checks import HALF
from ...support.reused_memory import scratch
from ..encoder import Operands

CHUNK_ELEMENTS = 1 << 20
# of weights that are raised to another dtype at once, [C, d]
RAISED_ELEMENTS = 1 << 21
BLOCK_TOKENS = 2048
# of rows that are gathered and then raised
RAISED_AT_ONCE = 1 << 17
# rows of weights, one an entry, that are gathered at once
GATHERED_ELEMENTS = 1 << 18
# A chunk of a search is a multiple of so many features wide, so that its maxima can be taken in blocks.
BLOCK_FEATURES = 32
# features that are multiplied at once, at least: two threads share narrower products badly
FEWEST_TOGETHER = 192
# Said once a process by torch for every CSR tensor; the operations used here are covered by our tests.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """This form computes in float32 for 16-bit inputs, and autocast would round one operand of a product.

    The first argument is a tensor, or a value whose first field is one.
    """

    @functools.wraps(function)
    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        tensor = first[0] if isinstance(first, tuple) else first
        with torch.autocast(tensor.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return call


def chunk_width(operands: Operands) -> int:
    """Features a chunk: a multiple of 64 that keeps [B, C] near 1M elements, and weights that are raised small.

    With a screen twice as many, which take the same bytes in bfloat16.
    """
    width = max(64, CHUNK_ELEMENTS // max(1, operands.n_tokens) // 64 * 64) * (1 if operands.screen is None else 2)
    if operands.W.dtype == operands.x.dtype:
        return width
    return min(width, max(64, RAISED_ELEMENTS // operands.x.shape[1] // 64 * 64))


def raised(rows: Tensor, like: Tensor) -> Tensor:
    """Rows of the weights in the dtype of `like`; in memory that serves again where they have another."""
    return rows if rows.dtype == like.dtype else scratch(like, *rows.shape).copy_(rows)


def token_blocks(operands: Operands, step: int = BLOCK_TOKENS) -> Iterator[tuple[slice, Operands]]:
    """(some tokens, their operands) block by block."""
    n_tokens = operands.n_tokens
    for start in range(0, n_tokens, step):
        at = slice(start, min(start + step, n_tokens))
        yield at, operands if n_tokens <= step else operands.of_tokens(at)


def feature_chunks(operands: Operands) -> Iterator[tuple[slice, Tensor]]:
    """(features, their activations after the relu [C, T]) chunk by chunk, for one block of T tokens after another."""
    n_features = operands.n_features
    for _, block in token_blocks(operands):
        x, W, b, scale, *_ = block
        step = chunk_width(block)
        buffer = scratch(x, min(step, n_features), len(x))
        for start in range(0, n_features, step):
            at = slice(start, min(start + step, n_features))
            a = buffer[: at.stop - start]
            torch.addmm(b[at, None], raised(W[at], x), x.t(), out=a).relu_()
            if scale is not None:
                a.mul_(scale[at, None])
            yield at, a


def candidate_spans(operands: Operands, first: int | None = None) -> Iterator[slice]:
    """Which candidates are looked at together: as many as keep [B, C] near 1M elements.

    Where nothing is known of the threshold, spans start with `first` candidates and double, so that the first cut
    comes early.
    """
    largest = chunk_width(operands)
    start, width = 0, min(first or largest, largest)
    while start < operands.n_candidates:
        yield slice(start, min(start + width, operands.n_candidates))
        start, width = start + width, min(2 * width, largest)


def part_width(d: int, elements: int, most: int) -> int:
    """Features whose weights [C, d] are about so many elements, but not fewer than make a fast product, nor more."""
    return max(FEWEST_TOGETHER, min(most, -(-elements // d // 64) * 64))


def parts_of(span: slice, width: int) -> Iterator[tuple[slice, slice]]:
    """(some features of a span, their columns in its chunk): so many at a time."""
    for start in range(span.start, span.stop, width):
        stop = min(start + width, span.stop)
        yield slice(start, stop), slice(start - span.start, stop - span.start)


def padded_chunk(like: Tensor, n_tokens: int, span: slice) -> tuple[Tensor, Tensor]:
    """Room for a chunk [B, C], C a multiple of BLOCK_FEATURES, padded with -inf; and its part without padding."""
    width = span.stop - span.start
    a = scratch(like, n_tokens, -(-width // BLOCK_FEATURES) * BLOCK_FEATURES)
    a[:, width:] = -torch.inf
    return a, a[:, :width]


def features_of(operands: Operands, span: slice) -> slice | Tensor:
    """The features of a span of candidates."""
    return span if operands.members is None else operands.members[span]


def activations_at(operands: Operands, span: slice) -> Tensor:
    """Activations before the relu, as `padded_chunk` has them."""
    x, W, b, scale, *_ = operands
    at = features_of(operands, span)
    a, inner = padded_chunk(x, len(x), span)
    torch.addmm(b[at], x, raised(W[at], x).t(), out=inner)
    if scale is not None:
        inner.mul_(scale[at])
    return a


def sampled_product(left: Tensor, W: Tensor, token_ends: Tensor, features: Tensor) -> Tensor:
    """left_i . W_j at each entry (i, j), [n]; sorted by token, of which `token_ends` [B + 1] are the offsets.

    In the dtype of `left`, in float32 where that has 16 bits.
    """
    if left.dtype in HALF:
        left = left.float()
    if W.dtype != left.dtype:
        return gathered_product(left, W, token_ends, features)
    pattern = torch.sparse_csr_tensor(
        token_ends, features, left.new_zeros(len(features)), (len(left), len(W)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, left, W.t(), beta=0.0).values()


def products_by_feature(x: Tensor, W: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
    """x_i . w_j of entries sorted by feature, [n], each as in `sampled_product`.

    A row of the weights, of which a cache holds few, is then read once; the tokens are few enough to stay in one.

    Args:
        x: [T, d], contiguous, in the dtype of the products.
    """
    if len(features) == 0:
        return x.new_empty(0)
    if W.dtype == x.dtype:
        first, last = features[[0, -1]].tolist()
        ends = ends_of_tokens(features - first, last + 1 - first)
        return sampled_product(W[first : last + 1], x, ends, tokens)
    rows, counts = features.unique_consecutive(return_counts=True)
    ends, out = torch.cat((counts.new_zeros(1), counts.cumsum(0))), x.new_empty(len(features))
    for at, raised in gathered_rows(x, W, rows):
        own = ends[at.start : at.start + len(raised) + 1]
        some = slice(*own[[0, -1]].tolist())
        out[some] = sampled_product(raised, x, own - some.start, tokens[some])
    return out


def gathered_product(left: Tensor, W: Tensor, token_ends: Tensor, features: Tensor) -> Tensor:
    """`sampled_product` with weights of another dtype: what is needed of them is raised."""
    out = left.new_empty(len(features))
    for at, rows in gathered_rows(left, W, features):
        ends = (token_ends - at.start).clamp_(0, len(rows))
        out[at] = sampled_product(left, rows, ends, torch.arange(len(rows), device=rows.device))
    return out


@without_autocast
def sums_of_rows(source: Tensor, columns: Tensor, weights: Tensor, ends: Tensor, out: Tensor) -> Tensor:
    """sum weights_e source_(columns_e) over the entries e of each row, at offsets `ends` [R + 1], into `out` [R, d]."""
    if out.is_cuda or not torch.backends.mkl.is_available():  # MKL alone is known not to read what it is not to add to
        out.zero_()
    shape = len(out), len(source)
    return torch.addmm(
        out, torch.sparse_csr_tensor(ends, columns, weights, shape, check_invariants=False), source, beta=0, out=out
    )


def gathered_sums(weights: Tensor, W: Tensor, token_ends: Tensor, features: Tensor) -> Tensor:
    """sum_j weights_ij W_j, [B, d] in the dtype of the weights of the sum, which W does not have."""
    out = weights.new_zeros(len(token_ends) - 1, W.shape[1])
    tokens = torch.repeat_interleave(token_ends.diff(), output_size=len(features))
    for at, rows in gathered_rows(weights, W, features):
        first, last = tokens[at.start : at.stop][[0, -1]].tolist()
        offsets = (token_ends[first : last + 1] - at.start).clamp_min_(0)
        every = torch.arange(len(rows), device=rows.device)
        out[first : last + 1] += embedding_bag(every, rows, offsets, mode="sum", per_sample_weights=weights[at])
    return out


def gathered_rows(like: Tensor, W: Tensor, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(some entries, the rows of W of their features in the dtype of `like`), some after others."""
    step = max(1, GATHERED_ELEMENTS // W.shape[1])
    for start in range(0, len(features), step):
        at = slice(start, min(start + step, len(features)))
        yield at, raised_rows(W, features[at], like)


def raised_rows(source: Tensor, at: Tensor, like: Tensor) -> Tensor:
    """`source.index_select(0, at)` in the dtype of `like`, another one, in memory that serves again."""
    rows = scratch(like, len(at), source.shape[1])
    # few at a time, which are in the cache when they are raised
    step = max(1, RAISED_AT_ONCE // source.shape[1])
    for few, raised_few in zip(at.split(step), rows.split(step)):
        raised_few.copy_(torch.index_select(source, 0, few, out=scratch(source, len(few), source.shape[1])))
    return rows


def ends_of_tokens(tokens: Tensor, n_tokens: int) -> Tensor:
    """[B + 1] offsets of each token's entries, which are sorted by token."""
    counts = torch.bincount(tokens, minlength=n_tokens)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))

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

from ...support.reused_memory import scratch
from ..encoder import Operands

CHUNK_ELEMENTS = 1 << 20
BLOCK_TOKENS = 2048
# A chunk of a search is a multiple of so many features wide, so that its maxima can be taken in blocks.
BLOCK_FEATURES = 32
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


def chunk_features(n_tokens: int) -> int:
    """Features a chunk: a multiple of 64 that keeps [B, C] near 1M elements."""
    return max(64, CHUNK_ELEMENTS // n_tokens // 64 * 64)


def token_blocks(operands: Operands) -> Iterator[tuple[int, Operands]]:
    """(first token, the operands of some tokens) block by block."""
    if 0 < operands.n_tokens <= BLOCK_TOKENS:
        yield 0, operands
        return
    for start in range(0, operands.n_tokens, BLOCK_TOKENS):
        yield start, operands.of_tokens(slice(start, start + BLOCK_TOKENS))


def feature_chunks(operands: Operands) -> Iterator[tuple[slice, Tensor]]:
    """(features, their activations after the relu [C, T]) chunk by chunk, for one block of T tokens after another."""
    n_features = operands.n_features
    for _, (x, W, b, scale, *_) in token_blocks(operands):
        step = chunk_features(len(x))
        buffer = scratch(x, min(step, n_features), len(x))
        for start in range(0, n_features, step):
            at = slice(start, min(start + step, n_features))
            a = buffer[: at.stop - start]
            torch.addmm(b[at, None], W[at].to(x.dtype), x.t(), out=a).relu_()
            if scale is not None:
                a.mul_(scale[at, None])
            yield at, a


def candidate_spans(operands: Operands, first: int | None = None) -> Iterator[slice]:
    """Which candidates are looked at together: as many as keep [B, C] near 1M elements.

    Where nothing is known of the threshold, spans start with `first` candidates and double, so that the first cut
    comes early.
    """
    largest = chunk_features(operands.n_tokens)
    start, width = 0, min(first or largest, largest)
    while start < operands.n_candidates:
        yield slice(start, min(start + width, operands.n_candidates))
        start, width = start + width, min(2 * width, largest)


def padded_chunk(operands: Operands, span: slice) -> tuple[Tensor, Tensor]:
    """Room for a chunk [B, C], C a multiple of BLOCK_FEATURES, padded with -inf; and its part without padding."""
    width = span.stop - span.start
    a = scratch(operands.x, operands.n_tokens, -(-width // BLOCK_FEATURES) * BLOCK_FEATURES)
    a[:, width:] = -torch.inf
    return a, a[:, :width]


def features_of(operands: Operands, span: slice) -> slice | Tensor:
    """The features of a span of candidates."""
    return span if operands.members is None else operands.members[span]


def activations_at(operands: Operands, span: slice) -> Tensor:
    """Activations before the relu, as `padded_chunk` has them."""
    x, W, b, scale, *_ = operands
    at = features_of(operands, span)
    a, inner = padded_chunk(operands, span)
    torch.addmm(b[at], x, W[at].to(x.dtype).t(), out=inner)
    if scale is not None:
        inner.mul_(scale[at])
    return a


def sampled_product(left: Tensor, W: Tensor, token_ends: Tensor, features: Tensor) -> Tensor:
    """left_i . W_j at each entry (i, j), [n]; sorted by token, of which `token_ends` [B + 1] are the offsets."""
    pattern = torch.sparse_csr_tensor(
        token_ends, features, left.new_zeros(len(features)), (len(left), len(W)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, left, W.to(left.dtype).t(), beta=0.0).values()


def ends_of_tokens(tokens: Tensor, n_tokens: int) -> Tensor:
    """[B + 1] offsets of each token's entries, which are sorted by token."""
    counts = torch.bincount(tokens, minlength=n_tokens)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))

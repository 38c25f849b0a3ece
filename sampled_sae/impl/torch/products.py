"""The encoder product chunk by chunk of features, in memory that serves again.

2BdF FLOP; the activations of a chunk (about 4 MB) never leave the cache. Larger batches are taken in blocks of tokens:
a chunk of all of them would be too few features wide for a product at full rate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...support.reused_memory import scratch
from ..encoder import Operands

CHUNK_ELEMENTS = 1 << 20
BLOCK_TOKENS = 2048
# A chunk of `activation_chunks` is a multiple of so many features wide, so that its maxima can be taken in blocks.
BLOCK_FEATURES = 32


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
    for i, x in enumerate(operands.x.split(BLOCK_TOKENS)):
        yield i * BLOCK_TOKENS, operands.of_tokens(x)


def feature_chunks(operands: Operands) -> Iterator[tuple[slice, Tensor]]:
    """(features, their activations after the relu [C, T]) chunk by chunk, for one block of T tokens after another."""
    n_features = operands.n_features
    for _, (x, W, b, scale, _) in token_blocks(operands):
        step = chunk_features(len(x))
        buffer = scratch(x, min(step, n_features), len(x))
        for start in range(0, n_features, step):
            at = slice(start, min(start + step, n_features))
            a = buffer[: at.stop - start]
            torch.addmm(b[at, None], W[at].to(x.dtype), x.t(), out=a).relu_()
            if scale is not None:
                a.mul_(scale[at, None])
            yield at, a


def activation_chunks(operands: Operands, first: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """(first candidate, activations before the relu [B, C]), C a multiple of BLOCK_FEATURES, padded with -inf.

    Where nothing is known of the threshold, chunks start with `first` columns and double, so that the first cut
    of the candidates comes early. One buffer serves all of them.
    """
    x, W, b, scale, members = operands
    n_candidates = operands.n_candidates
    largest = chunk_features(len(x))
    memory = scratch(x, len(x) * min(largest, -(-n_candidates // BLOCK_FEATURES) * BLOCK_FEATURES))
    start, width = 0, min(first or largest, largest)
    while start < n_candidates:
        stop = min(start + width, n_candidates)
        at = slice(start, stop) if members is None else members[start:stop]
        padded = -(-(stop - start) // BLOCK_FEATURES) * BLOCK_FEATURES
        a = memory[: len(x) * padded].view(len(x), padded)
        inner = a[:, : stop - start]
        if padded > stop - start:
            a[:, stop - start :] = -torch.inf
        torch.addmm(b[at], x, W[at].to(x.dtype).t(), out=inner)
        if scale is not None:
            inner.mul_(scale[at])
        yield start, a
        start, width = stop, min(2 * width, largest)

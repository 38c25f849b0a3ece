"""Column scores, and the pool of the highest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.operation import Inputs, Operation, some
from sampled_sae import reference
from sampled_sae.config import pool_size
from sampled_sae.testing import Comparison, comparison

CHECKED_COLUMNS = 512


def eager_scores(x: Tensor, W: Tensor, b: Tensor, score: str) -> Tensor:
    a = torch.relu(x @ W.t() + b.to(x.dtype))
    return reference.column_scores(a, score)


def eager_pool(scores: Tensor, size: int) -> Tensor:
    return torch.topk(scores, size, sorted=False).indices.sort().values


def scores(inputs: Inputs, score: str) -> Operation:
    w, x, W, b = inputs.workload, inputs.x, inputs.W, inputs.b

    def ours() -> Tensor:
        return inputs.parts.column_scores(x, W, b, score, None)

    def check() -> list[Comparison]:
        """Of some columns, all tokens."""
        at = some(w.F, CHECKED_COLUMNS, inputs.device)
        a = reference.encode(x.double(), W[at].t().double(), b[at].double())
        return [comparison(score, ours()[at], eager_scores(x, W[at], b[at], score), reference.column_scores(a, score))]

    return Operation(
        ours,
        eager_scores,
        lambda: (x, W, b, score),
        check,
        bytes=inputs.bytes_of(w.B + w.F) + 8 * w.F,
        flops=2 * w.B * w.d * w.F,
        eager_bytes=4 * w.B * w.F * x.element_size(),
    )


def pool(inputs: Inputs, l: float) -> Operation:
    w = inputs.workload
    size = pool_size(w.k, l, w.F)

    def ours() -> Tensor:
        return inputs.parts.candidate_pool(inputs.scores, size)

    def check() -> list[Comparison]:
        if not torch.equal(ours(), reference.candidate_pool(inputs.scores, size)):
            raise AssertionError("another pool than that of a stable sort")
        return []

    arguments: tuple[Any, ...] = (inputs.scores, size)
    return Operation(
        ours,
        eager_pool,
        lambda: arguments,
        check,
        bytes=4 * w.F + 8 * size,
        flops=0,
        eager_bytes=16 * w.F,
        rivals={"torch.topk": lambda: torch.topk(inputs.scores, size)},
    )

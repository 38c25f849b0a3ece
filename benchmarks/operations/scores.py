"""Column scores, the forms of their kernel beside the bare product, and the pool of the highest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import product
from benchmarks.operations.operation import Inputs, Operation, some
from sampled_sae import reference
from sampled_sae.config import pool_size
from sampled_sae.testing import Comparison, comparison, relative_error

CHECKED_COLUMNS = 512
# what sums of float32 or bf16 products in another order may differ by, beside the rounding of the result
TOLERANCE = 1e-3
TRITON_FORMS = (
    "Triton product, written",
    "Triton product, summed",
    "fused l2",
    "fused entropy",
    "chunked l2",
    "chunked entropy",
)


def eager_scores(x: Tensor, W: Tensor, b: Tensor, score: str) -> Tensor:
    a = torch.relu(x @ W.t() + b.to(x.dtype))
    return reference.column_scores(a, score)


def eager_pool(scores: Tensor, size: int) -> Tensor:
    return torch.topk(scores, size, sorted=False).indices.sort().values


def scores(inputs: Inputs, score: str) -> Operation:
    w, x, W, b = inputs.workload, inputs.x, inputs.W, inputs.b

    def check() -> list[Comparison]:
        """Of some columns, all tokens."""
        at = some(w.F, CHECKED_COLUMNS, inputs.device)
        exact = eager_scores(x.double(), W[at].double(), b[at], score)
        return [comparison(score, inputs.column_scores(score)[at], eager_scores(x, W[at], b[at], score), exact)]

    return Operation(
        lambda: inputs.column_scores(score),
        check,
        bytes=inputs.bytes_of(w.B + w.F) + 8 * w.F,
        flops=2 * w.B * w.d * w.F,
        eager=eager_scores,
        arguments=lambda: (x, W, b, score),
        eager_bytes=4 * w.B * w.F * x.element_size(),
    )


def form(inputs: Inputs, name: str) -> Operation:
    """The encoder product by torch ("product"), or one of TRITON_FORMS."""
    w, x, W = inputs.workload, inputs.x, inputs.W
    call = product(x, W) if name == "product" else triton_forms(x, W)[name]

    def check() -> list[Comparison]:
        """Of some features, all tokens."""
        at = some(w.F, CHECKED_COLUMNS, inputs.device)
        z = x.double() @ W[at].double().t()
        kind = name.split()[-1]
        result = call()
        if kind in ("product", "written"):
            pairs = [(result[:, at] if kind == "product" else result[at].t(), z)]
        elif kind == "summed":
            pairs = [(result[:, at].sum(0), z.sum(0))]
        else:
            a = z.relu()
            sums = {"l2": (a.square().sum(0),), "entropy": (a.sum(0), torch.xlogy(a, a).sum(0))}
            pairs = list(zip(result[:, at], sums[kind]))
        return [
            Comparison(name, relative_error(found, exact), 0.0, TOLERANCE + 4 * torch.finfo(found.dtype).eps)
            for found, exact in pairs
        ]

    return Operation(call, check, bytes=inputs.bytes_of(w.B + w.F), flops=2 * w.B * w.d * w.F)


def triton_forms(x: Tensor, W: Tensor) -> dict[str, Callable[[], Any]]:
    from benchmarks.operations.plain_product import plain_product
    from sampled_sae.impl.triton.scores import chunked_statistics
    from sampled_sae.kernels.column_scores import column_statistics

    b = torch.zeros(len(W), device=W.device)
    calls = (
        partial(plain_product, x, W, True),
        partial(plain_product, x, W, False),
        *(partial(column_statistics, x, W, b, score) for score in ("l2", "entropy")),
        *(partial(chunked_statistics, x, W, b, score) for score in ("l2", "entropy")),
    )
    return dict(zip(TRITON_FORMS, calls))


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
        check,
        bytes=4 * w.F + 8 * size,
        flops=0,
        eager=eager_pool,
        arguments=lambda: arguments,
        eager_bytes=16 * w.F,
        rivals={"torch.topk": lambda: torch.topk(inputs.scores, size)},
    )

"""Column scores, the forms of their kernel beside the bare product, and the pool of the highest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import product
from benchmarks.operations.operation import Inputs, Operation, some
from sampled_sae import reference
from sampled_sae.config import pool_size
from sampled_sae.impl.encoder import Operands
from sampled_sae.testing import Comparison, comparison, relative_error

CHECKED_COLUMNS = 512
# what sums of float32 or bf16 products in another order may differ by, beside the rounding of the result
TOLERANCE = 1e-3
# "fused uniform" has next to no epilogue: what the kernel's product costs
FORMS = tuple(f"{how} {score}" for how in ("fused", "chunked") for score in ("uniform", "l2", "entropy"))


def eager_scores(x: Tensor, W: Tensor, b: Tensor, score: str) -> Tensor:
    a = torch.relu(x @ W.t() + b.to(x.dtype))
    return reference.column_scores(a, score)


def eager_pool(scores: Tensor, size: int) -> Tensor:
    return torch.topk(scores, size, sorted=False).indices.sort().values


def scores(inputs: Inputs, score: str) -> Operation:
    x, W, b = inputs.x, inputs.W, inputs.b

    def check() -> list[Comparison]:
        """Of some columns, all tokens."""
        at = some(len(W), CHECKED_COLUMNS, inputs.device)
        exact = eager_scores(x.double(), W[at].double(), b[at], score)
        return [comparison(score, inputs.column_scores(score)[at], eager_scores(x, W[at], b[at], score), exact)]

    return Operation(
        lambda: inputs.column_scores(score),
        check,
        bytes=inputs.bytes_of(len(x) + len(W)) + 8 * len(W),
        flops=2 * x.numel() * len(W),
        eager=eager_scores,
        arguments=lambda: (x, W, b, score),
        eager_bytes=4 * len(x) * len(W) * x.element_size(),
    )


def form(inputs: Inputs, name: str) -> Operation:
    """The encoder product by torch ("product"), or the statistics of a score in one of FORMS."""
    x, W = inputs.x, inputs.W
    how, _, score = name.partition(" ")
    call = product(x, W) if name == "product" else statistics(inputs, how, score)

    def check() -> list[Comparison]:
        """Of some features, all tokens."""
        at = some(len(W), CHECKED_COLUMNS, inputs.device)
        z = x.double() @ W[at].double().t()
        a = z.relu()
        exact = {
            "": z.t(),
            "uniform": (a > 0).sum(0).double()[None],
            "l2": a.square().sum(0)[None],
            "entropy": torch.stack((a.sum(0), torch.xlogy(a, a).sum(0))),
        }[score]
        found = call()[:, at]
        pairs = zip(found if score else [found.t()], exact if score else [exact])
        allowed = TOLERANCE + 4 * torch.finfo(found.dtype).eps
        return [Comparison(name, relative_error(one, right), 0.0, allowed) for one, right in pairs]

    return Operation(call, check, bytes=inputs.bytes_of(len(x) + len(W)), flops=2 * x.numel() * len(W))


def statistics(inputs: Inputs, how: str, score: str) -> Callable[[], Tensor]:
    """Of one kernel for product and epilogue, or of products in chunks."""
    from sampled_sae.impl.triton.scores import chunked_statistics
    from sampled_sae.kernels.column_scores import column_statistics

    b = torch.zeros(len(inputs.W), device=inputs.device)
    if how == "fused":
        return lambda: column_statistics(inputs.x, inputs.W, b, score)
    return lambda: chunked_statistics(Operands(inputs.x, inputs.W, b), score)


def pool(inputs: Inputs, l: float) -> Operation:
    n_features = inputs.workload.F
    size = pool_size(inputs.workload.k, l, n_features)

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
        bytes=4 * n_features + 8 * size,
        flops=0,
        eager=eager_pool,
        arguments=lambda: arguments,
        eager_bytes=16 * n_features,
        rivals={"torch.topk": lambda: torch.topk(inputs.scores, size)},
    )

"""What is timed: one operation, its rivals on the same inputs, and the least that any of them must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Workload
from sampled_sae.bench import activations
from sampled_sae.codes import Selection
from sampled_sae.config import batch_budget, pool_size
from sampled_sae.impl.interface import implementation, resolve_impl
from sampled_sae.testing import Comparison

Check = Callable[[], list[Comparison]]


@dataclass(frozen=True)
class Operation:
    """One operation on given inputs.

    Attributes:
        ours: the call; `prepare` puts back, untimed, what it overwrites.
        eager, arguments: the same in eager PyTorch, a pure function for torch.compile, and what it is called with.
        to_compile: the form that torch.compile gets, where not `eager`.
        rivals: other calls, by name.
        bytes, flops: inputs read once, outputs written once; multiplications and additions that no form can avoid.
        eager_bytes: what the eager form takes beyond the inputs, about.
        check: compares ours with float64 and the eager form; an AssertionError tells of wrong entries.
    """

    ours: Callable[[], Any]
    eager: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    check: Check
    bytes: int
    flops: int
    eager_bytes: int
    prepare: Callable[[], Any] = lambda: None
    to_compile: Callable[..., Any] | None = None
    rivals: dict[str, Callable[[], Any]] = field(default_factory=dict)


class Inputs:
    """Tensors of one workload, made when they are first asked for.

    Args:
        workload: the sizes.
        device, dtype: where and in what the products are computed.
        impl: whose operations are ours.

    Attributes:
        x, other_x [B, d], W [F, d] with unit rows: in `dtype`; W serves as encoder and decoder. b [F]: float32.
        parts: the operations of `impl`, by name.
    """

    def __init__(self, workload: Workload, device: str, dtype: torch.dtype, impl: str = "auto") -> None:
        self.workload, self.device, self.dtype = workload, device, dtype
        self.impl = resolve_impl(impl, device, dtype)
        self.parts = implementation(self.impl)
        generator = torch.Generator(device).manual_seed(1)
        W = torch.randn(workload.F, workload.d, generator=generator, device=device)
        self.W = torch.nn.functional.normalize(W, dim=1).to(dtype)
        self.b = 0.01 * torch.randn(workload.F, generator=generator, device=device)
        self.x, self.other_x = (activations(workload.B, workload.d, seed).to(device, dtype) for seed in range(2))
        self._members: dict[float | None, Tensor | None] = {}
        self._codes: dict[float | None, Selection] = {}

    @cached_property
    def scores(self) -> Tensor:
        """l2, [F]."""
        return self.parts.column_scores(self.x, self.W, self.b, "l2", None)

    def members(self, l: float | None) -> Tensor | None:
        """The pool, int64 [P]; None for the whole dictionary."""
        if l not in self._members:
            size = pool_size(self.workload.k, l, self.workload.F)
            whole = size == self.workload.F
            self._members[l] = None if whole else self.parts.candidate_pool(self.scores, size)
        return self._members[l]

    def kept(self, l: float | None) -> Selection:
        """What the batch keeps, without a gradient."""
        if l not in self._codes:
            with torch.no_grad():
                self._codes[l] = self.select(l, "batch")
        return self._codes[l]

    def select(self, l: float | None, select: str, hint: Any = None, x: Tensor | None = None) -> Selection:
        """The layer's own selection, from the batch x unless another is given."""
        x, k = self.x if x is None else x, self.workload.k
        centred = self.parts.centre(x, None)
        return self.parts.select(x, None, centred, self.W, self.b, self.members(l), k=k, select=select, hint=hint)

    @property
    def budget(self) -> int:
        return batch_budget(self.workload.B, self.workload.k)

    def bytes_of(self, rows: int) -> int:
        """Of so many rows of d elements in `dtype`."""
        return rows * self.workload.d * self.dtype.itemsize


def some(n: int, most: int, device: str) -> Tensor:
    """Up to `most` of 0 to n - 1, at even distances."""
    m = min(n, most)
    return torch.arange(m, device=device) * n // m

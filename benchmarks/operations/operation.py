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
from sampled_sae.codes import SparseCodes
from sampled_sae.config import batch_budget, pool_size
from sampled_sae.impl.encoder import Encoder
from sampled_sae.impl.hints import Rule, ThresholdHints
from sampled_sae.impl.interface import implementation, resolve_impl
from sampled_sae.impl.row_gradients import RowSource
from sampled_sae.testing import Comparison


@dataclass(frozen=True)
class Operation:
    """One operation on given inputs.

    Attributes:
        ours: the call; `prepare` puts back, untimed, what it overwrites.
        check: compares ours with float64 and the eager form; an AssertionError tells of wrong entries.
        bytes, flops: inputs read once, outputs written once; multiplications and additions that no form can avoid.
        eager, arguments: the same in eager PyTorch, a pure function for torch.compile, and what it is called with.
        eager_bytes: what the eager form takes beyond the inputs, about.
        to_compile: the form that torch.compile gets, where not `eager`.
        rivals: other calls, by name.
    """

    ours: Callable[[], Any]
    check: Callable[[], list[Comparison]]
    bytes: int
    flops: int
    eager: Callable[..., Any] | None = None
    arguments: Callable[[], tuple[Any, ...]] = tuple
    eager_bytes: int = 0
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
        self._kept: dict[float | None, SparseCodes] = {}

    def encoder(self, x: Tensor | None = None, W: Tensor | None = None, rows: RowSource | None = None) -> Encoder:
        """Of x and W, or of others in their place."""
        return self.parts.encoder(self.x if x is None else x, self.W if W is None else W, self.b, rows=rows)

    def column_scores(self, score: str) -> Tensor:
        return self.parts.column_scores(self.encoder().operands, score)

    @cached_property
    def scores(self) -> Tensor:
        """l2, [F]."""
        return self.column_scores("l2")

    def members(self, l: float | None) -> Tensor | None:
        """The pool, int64 [P]; None for the whole dictionary."""
        if l not in self._members:
            size = pool_size(self.workload.k, l, self.workload.F)
            whole = size == self.workload.F
            self._members[l] = None if whole else self.parts.candidate_pool(self.scores, size)
        return self._members[l]

    def width(self, l: float | None) -> int:
        """How many features are candidates."""
        members = self.members(l)
        return self.workload.F if members is None else len(members)

    def kept(self, l: float | None) -> SparseCodes:
        """What the batch keeps, without a gradient."""
        if l not in self._kept:
            with torch.no_grad():
                self._kept[l] = self.parts.select(self.encoder(), self.members(l), Rule(self.workload.k))
        return self._kept[l]

    def hints(self, l: float | None, rule: Rule, known: bool) -> ThresholdHints:
        """What the layer knows of the threshold after another batch, or before the first one."""
        found = ThresholdHints()
        if known:
            with torch.no_grad():
                self.parts.select(self.encoder(self.other_x), self.members(l), rule, found)
        return found

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

"""Where the gradients of a step leave it: one node behind all others, which sums them over the processes at once.

Rows of gradients do not flow through it but are put aside; it is a function of `anchor`, which every one of them
depends on, and so runs after the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..impl.row_gradients import RowGradient, RowSource, empty_receiver
from ..pretrained import SKIP
from ..support.once_differentiable import once_differentiable
from .mesh import Mesh
from .weights import NAMES, Weights

ROWS = NAMES[:3]


@dataclass
class Pending(RowGradient):
    """Rows whose gradient is on its way.

    fresh: what a backward pass has left, of this process alone; `own`: of which features. union: what `align` found.
    """

    own: Tensor
    fresh: Tensor | None = None
    union: Tensor | None = None


@dataclass
class Aside:
    """What a step has put aside. It knows nothing of the anchor, whose node knows it: a circle would never be freed.

    dense: whether gradients of rows are to become dense ones. pending: the rows. shared: by id, features that are the
    same on all processes of the data dimension, such as a pool. among: by the id of others, which of those they are
    among.
    """

    dense: bool
    pending: list[Pending] = field(default_factory=list)
    shared: dict[int, Tensor] = field(default_factory=dict)
    among: dict[int, Tensor] = field(default_factory=dict)


class SpreadRows(RowSource):
    """Rows whose gradients are summed over the processes, then kept as rows or made dense.

    Attributes:
        wanted: the weights that ask for a gradient; none outside autograd.
        aside: the rows so far. anchor: what their gradients hang on.
    """

    def __init__(self, keep_rows: bool, wanted: frozenset[str]) -> None:
        super().__init__(keep=True)
        self.wanted = wanted
        self.aside = Aside(dense=not keep_rows)
        self.anchor: Tensor | None = None

    def gather(self, name: str, W: Tensor, features: Tensor, dtype: torch.dtype) -> Tensor:
        return self._put_aside(name, W, features, W.detach().index_select(0, features).to(dtype))

    def receiver(self, name: str, W: Tensor, features: Tensor, dtype: torch.dtype) -> Tensor:
        return self._put_aside(name, W, features, empty_receiver(W.detach(), features, dtype))

    def _put_aside(self, name: str, W: Tensor, features: Tensor, rows: Tensor) -> Tensor:
        if name not in self.wanted or not torch.is_grad_enabled():
            return rows
        part = Pending(name, features, empty_receiver(W.detach(), features, rows.dtype), own=features)
        self.aside.pending.append(part)
        if not self.aside.dense:
            self.gradients.append(part)
        return PutAside.apply(self.anchor, rows, part)


class PutAside(torch.autograd.Function):
    """The rows; their gradient stays with `part`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, part: Pending) -> Tensor:
        ctx.part = part
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        part = ctx.part
        part.fresh = grad if part.fresh is None else part.fresh + grad
        return grad.new_zeros(()), None, None


class SumGradients(torch.autograd.Function):
    """b_dec [d] twice, for the encoder and for the decoder, the anchor, 0-dim, and of a skip W_skip [d_in, d].

    parameters: W_enc, b_enc, W_dec, b_dec, and W_skip where there is one.
    """

    @staticmethod
    def forward(ctx: Any, aside: Aside, mesh: Mesh, weights: Weights, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.aside, ctx.mesh, ctx.weights = aside, mesh, weights
        b_dec, *skip = (weights.local(p) for p in parameters[3:])
        return b_dec.clone(), b_dec.clone(), b_dec.new_zeros(()), *(W.clone() for W in skip)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, into_encoder: Tensor, of_decoder: Tensor, _: Tensor, *skip: Tensor) -> tuple[Any, ...]:
        aside, mesh, weights = ctx.aside, ctx.mesh, ctx.weights
        # each process of the feature dimension has subtracted b_dec for its own features, and all have added it
        b_dec = into_encoder + of_decoder if mesh.feature.rank == 0 else into_encoder.clone()
        parts = [part for part in aside.pending if part.fresh is not None]
        align(parts, aside, weights.n_local, mesh)
        # over `feature` last: lists of other lengths may be summed in another order, and these are the same everywhere
        b_dec, *skip_sums = sum_all(parts, [b_dec, *skip], mesh)
        b_dec = mesh.feature.sum_(b_dec.contiguous(), "b_dec")
        skip_sums = [W.contiguous() for W in skip_sums]
        if mesh.data.size > 1:  # else all processes of `feature` have computed the same
            skip_sums = [mesh.feature.from_(W, purpose="skip") for W in skip_sums]
        gradients: list[Tensor | None] = [None] * 3
        if aside.dense:
            gradients = [dense(weights, [p for p in parts if p.name == name], b_dec.dtype) for name in ROWS]
        else:
            for part in parts:
                part.rows.grad = part.fresh if part.rows.grad is None else part.rows.grad + part.fresh
        for part in parts:
            part.fresh = None
        wanted = ctx.needs_input_grad[3:]
        gradients.append(weights.wrap("b_dec", b_dec))
        gradients += [weights.wrap(SKIP, W) for W in skip_sums]
        return None, None, None, *(g if want else None for g, want in zip(gradients, wanted))


def sum_all(parts: list[Pending], dense: list[Tensor], mesh: Mesh) -> list[Tensor]:
    """Sums what the parts hold over the data dimension, and dense gradients, which are returned: one collective."""
    if mesh.data.size == 1:
        return dense
    tensors = [*dense, *(part.fresh for part in parts if part.fresh is not None)]
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    flat = mesh.data.sum_(torch.cat([t.reshape(-1).to(dtype) for t in tensors]), "gradients")
    sums = [s.view(t.shape).to(t.dtype) for s, t in zip(flat.split([t.numel() for t in tensors]), tensors)]
    for part, total in zip(parts, sums[len(dense) :]):
        part.fresh = total
    return sums[: len(dense)]


def align(parts: list[Pending], aside: Aside, n_features: int, mesh: Mesh) -> None:
    """Gives each part the features that any process of the data dimension has touched in its place.

    Those of a pool are the same everywhere; of others the union is found, which waits for the device.
    """
    if mesh.data.size == 1:
        return
    unions: dict[int, Tensor] = {}
    for part in parts:
        features, fresh = part.own, part.fresh
        if id(features) in aside.shared:
            continue
        if part.union is None:
            if id(features) not in unions:
                unions[id(features)] = union(features, aside.among.get(id(features)), n_features, mesh)
            part.features = part.union = unions[id(features)]
        assert fresh is not None
        aligned = part.fresh = rows_at(part.union, features, fresh)
        if part.rows.shape != aligned.shape:
            part.rows = empty_receiver(fresh, part.union, fresh.dtype)


def union(features: Tensor, among: Tensor | None, n_features: int, mesh: Mesh) -> Tensor:
    """int64, ascending: every feature that a process of the data dimension has; where given, of `among` those alone.

    A list may hold others beside them, whose gradient is 0: all features where most are touched, or what fills it.
    """
    touched = torch.zeros(n_features, dtype=torch.uint8, device=features.device).index_fill_(0, features, 1)
    touched = touched if among is None else touched.index_select(0, among)
    found = mesh.data.max_(touched, "touched features").nonzero().squeeze(1)
    return found if among is None else among.index_select(0, found)


def rows_at(union: Tensor, features: Tensor, rows: Tensor) -> Tensor:
    """[U, ...]: of rows [T, ...] of `features`, ascending as those of `union` are, those there; 0 for what is not."""
    if len(features) == 0:
        return rows.new_zeros(len(union), *rows.shape[1:])
    at = torch.searchsorted(features, union).clamp_(max=len(features) - 1)
    missing = features.index_select(0, at) != union
    return rows.index_select(0, at).masked_fill_(missing.view(-1, *[1] * (rows.dim() - 1)), 0)


def dense(weights: Weights, parts: list[Pending], dtype: torch.dtype) -> Tensor | None:
    """The gradient of a weight from those of its rows, as a DTensor; None where there are none."""
    total = None
    for part in parts:
        assert part.fresh is not None
        if total is None:
            total = part.fresh.new_zeros(weights.n_local, *part.fresh.shape[1:], dtype=dtype)
        total.index_add_(0, part.features, part.fresh.to(dtype))
    return None if total is None else weights.wrap(parts[0].name, total)

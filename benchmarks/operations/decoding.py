"""Decode of the kept entries, and the gradients of encoder and decoder at them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.operations.operation import Inputs, Operation, some
from sampled_sae.codes import SparseCodes
from sampled_sae.impl.hints import Rule
from sampled_sae.impl.row_gradients import RowSource
from sampled_sae.testing import Comparison, comparison

CHECKED_TOKENS, CHECKED_FEATURES = 64, 256
# of a kept entry in a list: value, token, feature at 4 bytes each
ENTRY_BYTES = 12


def eager_decode(c: Tensor, W_dec: Tensor, members: Tensor | None) -> Tensor:
    """c W_dec of dense codes: [B, P] of a pool, or [B, F]."""
    return c @ (W_dec if members is None else W_dec[members])


def eager_gradients(
    grad: Tensor, c: Tensor, x: Tensor, W_dec: Tensor, members: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows of W_dec and W_enc.T and of b_enc, for the gradient of x_hat and dense codes c [B, P] or [B, F]."""
    rows = W_dec if members is None else W_dec[members]
    dc = torch.where(c > 0, grad @ rows.t(), 0)
    return c.t() @ grad, dc.t() @ x, dc.sum(0)


def dense(codes: SparseCodes, dim: int, at: Tensor | None) -> Tensor:
    """codes.to_dense().index_select(dim, at), of which nothing else is made; all of it for None."""
    if at is None:
        return codes.to_dense()
    values, *places = codes.entries()
    place = torch.full((codes.shape[dim],), -1, device=values.device)
    place[at] = torch.arange(len(at), device=values.device)
    places[dim] = place[places[dim]]
    here = places[dim] >= 0
    shape = [len(at) if i == dim else n for i, n in enumerate(codes.shape)]
    return values.new_zeros(shape).index_put_(tuple(p[here] for p in places), values[here])


def embedding_bag_decode(codes: SparseCodes, W: Tensor) -> Callable[[], Tensor]:
    """The decode of entries that are sorted by token, as torch has it."""
    values, tokens, features = codes.entries()
    counts = torch.bincount(tokens, minlength=codes.shape[0])
    starts, weights = counts.cumsum(0) - counts, values.to(W.dtype)
    return lambda: embedding_bag(features, W, starts, mode="sum", per_sample_weights=weights)


def decode(inputs: Inputs, l: float | None) -> Operation:
    w, W, members, codes = inputs.workload, inputs.W, inputs.members(l), inputs.kept(l)

    def ours() -> Tensor:
        with torch.no_grad():
            return inputs.parts.decode(codes, W, None)

    def check() -> list[Comparison]:
        """Of some tokens."""
        at = some(w.B, CHECKED_TOKENS, inputs.device)
        c = dense(codes, 0, at)
        return [comparison("x_hat", ours()[at], c.to(W.dtype) @ W, c.double() @ W.double())]

    active = len(codes.active_features())
    return Operation(
        ours,
        check,
        bytes=ENTRY_BYTES * codes.count() + inputs.bytes_of(active) + 4 * w.B * w.d,
        flops=2 * codes.count() * w.d,
        eager=eager_decode,
        arguments=lambda: (dense(codes, 1, members).to(W.dtype), W, members),
        eager_bytes=(4 + 2 * W.element_size()) * w.B * inputs.width(l),
        rivals={"embedding_bag": embedding_bag_decode(codes, W)} if members is None else {},
    )


def backward(inputs: Inputs, l: float | None) -> Operation:
    """The gradients of the touched rows of W_enc, b_enc and W_dec, as RowAdam takes them."""
    w, x, W, members, width = inputs.workload, inputs.x, inputs.W, inputs.members(l), inputs.width(l)
    grad = torch.randn(w.B, w.d, generator=torch.Generator().manual_seed(2)).to(inputs.device) / w.d**0.5
    rows = RowSource(keep=True)
    W_enc, W_dec = (W.clone().requires_grad_() for _ in range(2))
    encoder = inputs.encoder(W=W_enc, rows=rows)._replace(b=inputs.b.clone().requires_grad_())
    selected = inputs.parts.select(encoder, members, Rule(w.k))
    x_hat, codes = inputs.parts.decode(selected, W_dec, None, rows), selected.detach()
    leaves = [part.rows for part in rows.gradients]

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(x_hat, leaves, grad.to(x_hat.dtype), retain_graph=True)

    def check() -> list[Comparison]:
        """Of some features."""
        active = codes.active_features()
        at = active[some(len(active), CHECKED_FEATURES, inputs.device)]
        c = dense(codes, 1, at)
        eager = eager_gradients(grad.to(x.dtype), c.to(x.dtype), x, W[at], None)
        exact = eager_gradients(grad.double(), c.double(), x.double(), W[at].double(), None)
        found = {p.name: g[torch.searchsorted(p.features, at)] for p, g in zip(rows.gradients, ours())}
        names = ("W_dec", "W_enc", "b_enc")
        return [comparison(f"grad {n}", found[n], e, exact_one) for n, e, exact_one in zip(names, eager, exact)]

    touched, kept = len(codes.active_features()), codes.count()
    return Operation(
        ours,
        check,
        bytes=4 * w.B * w.d + inputs.bytes_of(w.B + touched) + ENTRY_BYTES * kept + 4 * touched * (2 * w.d + 1),
        flops=6 * kept * w.d,
        eager=eager_gradients,
        arguments=lambda: (grad.to(x.dtype), dense(codes, 1, members).to(x.dtype), x, W, members),
        eager_bytes=(4 + 3 * x.element_size()) * w.B * width + 3 * inputs.bytes_of(width),
    )

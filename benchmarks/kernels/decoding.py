"""Decode of the kept entries, and the gradients of encoder and decoder at them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.kernels.operation import Inputs, Operation, some
from sampled_sae.codes import SparseCodes
from sampled_sae.impl.row_gradients import RowSource
from sampled_sae.testing import Comparison, comparison

CHECKED_TOKENS, CHECKED_FEATURES = 64, 256


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


def dense_codes(codes: SparseCodes, members: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, F], or [B, P] where the features are those of a pool."""
    if members is None:
        return codes.to_dense().to(dtype)
    values, tokens, features = codes.entries()
    block = values.new_zeros(codes.shape[0], len(members), dtype=dtype)
    return block.index_put_((tokens, torch.searchsorted(members, features)), values.to(dtype))


def embedding_bag_decode(codes: SparseCodes, W: Tensor) -> Callable[[], Tensor]:
    """The decode of entries that are sorted by token, as torch has it."""
    values, tokens, features = codes.entries()
    counts = torch.bincount(tokens, minlength=codes.shape[0])
    starts, weights = counts.cumsum(0) - counts, values.to(W.dtype)
    return lambda: embedding_bag(features, W, starts, mode="sum", per_sample_weights=weights)


def decode(inputs: Inputs, l: float | None) -> Operation:
    w, W, members = inputs.workload, inputs.W, inputs.members(l)
    codes = inputs.kept(l).codes
    width = w.F if members is None else len(members)

    def ours() -> Tensor:
        with torch.no_grad():
            return inputs.parts.decode(codes, W, None)

    def check() -> list[Comparison]:
        """Of some tokens."""
        at = some(w.B, CHECKED_TOKENS, inputs.device)
        values, tokens, features = codes.entries()
        place = torch.full((w.B,), -1, device=W.device)
        place[at] = torch.arange(len(at), device=W.device)
        here = place[tokens] >= 0
        active, column = torch.unique(features[here], return_inverse=True)
        c = values.new_zeros(len(at), len(active)).index_put((place[tokens[here]], column), values[here])
        eager = eager_decode(c.to(W.dtype), W[active], None)
        return [comparison("x_hat", ours()[at], eager, c.double() @ W[active].double())]

    return Operation(
        ours,
        eager_decode,
        lambda: (dense_codes(codes, members, W.dtype), W, members),
        check,
        bytes=bytes_of_codes(inputs, l) + inputs.bytes_of(active_features(inputs, l)) + 4 * w.B * w.d,
        flops=2 * codes.count() * w.d,
        eager_bytes=(4 + 2 * W.element_size()) * w.B * width,
        rivals={"embedding_bag": embedding_bag_decode(codes, W)} if members is None else {},
    )


def backward(inputs: Inputs, l: float | None) -> Operation:
    """The gradients of the touched rows of W_enc, b_enc and W_dec, as RowAdam takes them."""
    w, x, W, members = inputs.workload, inputs.x, inputs.W, inputs.members(l)
    width = w.F if members is None else len(members)
    grad = torch.randn(w.B, w.d, generator=torch.Generator().manual_seed(2)).to(inputs.device) / w.d**0.5
    W_enc, W_dec, b = (t.clone().requires_grad_() for t in (W, W, inputs.b))
    rows = RowSource(keep=True)
    centred = inputs.parts.centre(x, None)
    selected = inputs.parts.select(x, None, centred, W_enc, b, members, k=w.k, rows=rows)
    x_hat = inputs.parts.decode(selected.codes, W_dec, None, rows)
    leaves = [part.rows for part in rows.gradients]
    detached = selected.codes.detach()

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(x_hat, leaves, grad.to(x_hat.dtype), retain_graph=True)

    def check() -> list[Comparison]:
        """Of some features."""
        values, tokens, features = detached.entries()
        active = torch.unique(features)
        at = active[some(len(active), CHECKED_FEATURES, inputs.device)]
        place = torch.full((w.F,), -1, device=W.device)
        place[at] = torch.arange(len(at), device=W.device)
        here = place[features] >= 0
        c = values.new_zeros(w.B, len(at)).index_put((tokens[here], place[features[here]]), values[here])
        names = ("W_dec", "W_enc", "b_enc")
        eager = eager_gradients(grad.to(x.dtype), c.to(x.dtype), x, W[at], None)
        exact = eager_gradients(grad.double(), c.double(), x.double(), W[at].double(), None)
        found = {p.name: g[torch.searchsorted(p.features, at)] for p, g in zip(rows.gradients, ours())}
        return [comparison(f"grad {n}", found[n], e, exact_one) for n, e, exact_one in zip(names, eager, exact)]

    touched = active_features(inputs, l)
    return Operation(
        ours,
        eager_gradients,
        lambda: (grad.to(x.dtype), dense_codes(detached, members, x.dtype), x, W, members),
        check,
        bytes=4 * w.B * w.d + inputs.bytes_of(w.B + touched) + bytes_of_codes(inputs, l) + 4 * touched * (2 * w.d + 1),
        flops=6 * detached.count() * w.d,
        eager_bytes=(4 + 3 * x.element_size()) * w.B * width + 3 * inputs.bytes_of(width),
    )


def active_features(inputs: Inputs, l: float | None) -> int:
    return len(inputs.kept(l).codes.active_features())


def bytes_of_codes(inputs: Inputs, l: float | None) -> int:
    """Of the kept entries in a list: value, token, feature at 4 bytes each."""
    return 12 * inputs.kept(l).codes.count()

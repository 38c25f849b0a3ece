"""Batch and token top-k: of a block [B, P] in memory, and of a pool or the whole dictionary from x and W."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from benchmarks.operations.decoding import dense
from benchmarks.operations.operation import Inputs, Operation, some
from sampled_sae import reference
from sampled_sae.codes import SparseCodes
from sampled_sae.impl.hints import Rule
from sampled_sae.impl.torch.entries import EntryIndex
from sampled_sae.testing import Comparison, comparison

# the latter at once
CHECKED_ENTRIES, CHECKED_TOKENS = 4096, 512
# of the largest activation: what rounding in float32 may move at the cut
MARGIN = 2e-5


def eager_top(z: Tensor, n: int, select: str) -> Tensor:
    """relu(z) [B, P] with its n largest kept, of the batch or of each token."""
    a = torch.relu(z)
    if select == "token":
        top = torch.topk(a, n, dim=1, sorted=False)
        return torch.zeros_like(a).scatter(1, top.indices, top.values)
    flat = a.flatten()
    top = torch.topk(flat, n, sorted=False)
    return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(a)


def eager_select(x: Tensor, W: Tensor, b: Tensor, members: Tensor | None, n: int, select: str) -> Tensor:
    if members is not None:
        W, b = W[members], b[members]
    return eager_top(x @ W.t() + b.to(x.dtype), n, select)


def block_top(inputs: Inputs, l: float, select: str) -> Operation:
    """Selection alone: z [B, P] is the product with the bias added, float32."""
    w, members = inputs.workload, inputs.members(l)
    assert members is not None
    z = inputs.x.float() @ inputs.W[members].float().t() + inputs.b[members]
    n = w.k if select == "token" else inputs.budget
    work = torch.empty_like(z)
    low = torch.empty_like(z, dtype=inputs.dtype) if inputs.dtype != torch.float32 else None

    def ours() -> Tensor:
        if inputs.impl == "torch":
            return torch.where(Rule(w.k, select).mask(z), z, 0)
        from sampled_sae.kernels.batch_topk import keep_largest_
        from sampled_sae.kernels.token_topk import keep_rows_

        (keep_rows_ if select == "token" else keep_largest_)(work, n, copy=low)
        return work

    def check() -> list[Comparison]:
        work.copy_(z)
        a = torch.relu(z)
        mask = reference.select_token(a, n) if select == "token" else reference.select_batch(a, n)
        wrong = int((ours() != torch.where(mask, a, 0)).sum())
        if wrong:
            raise AssertionError(f"{wrong} entries differ from those of a stable sort")
        return []

    a = torch.relu(z) if select == "token" else torch.relu(z).flatten()
    return Operation(
        ours,
        check,
        bytes=z.numel() * (8 + (0 if low is None else low.element_size())),
        flops=0,
        eager=eager_top,
        arguments=lambda: (z, n, select),
        eager_bytes=12 * z.numel() + 12 * inputs.budget,
        prepare=(lambda: None) if inputs.impl == "torch" else (lambda: work.copy_(z)),
        rivals={"torch.topk": lambda: torch.topk(a, n)},
    )


def select(inputs: Inputs, l: float | None, select: str, first_batch: bool = False) -> Operation:
    """What the layer does after the scores: the product with the pool, the selection from it, the order of entries.

    The threshold to begin with is guessed from another batch, as in training, or with `first_batch` not at all.
    """
    w, members, size, rule = inputs.workload, inputs.members(l), inputs.width(l), Rule(inputs.workload.k, select)
    n = w.k if select == "token" else inputs.budget
    before = inputs.hints(l, rule, known=not first_batch)
    known = {"hints": deepcopy(before)}

    def ours() -> SparseCodes:
        with torch.no_grad():
            codes = inputs.parts.select(inputs.encoder(), members, rule, known["hints"])
        if isinstance(codes.index, EntryIndex):
            # made when they are first asked for: by whoever comes next, decode or backward
            _ = codes.index.token_ends, codes.index.by_feature
        return codes

    return Operation(
        ours,
        lambda: check_selection(inputs, ours(), members, select),
        bytes=inputs.bytes_of(w.B + size) + 4 * size + 12 * inputs.budget,
        flops=2 * w.B * w.d * size,
        eager=eager_select,
        arguments=lambda: (inputs.x, inputs.W, inputs.b, members, n, select),
        eager_bytes=4 * w.B * size * inputs.x.element_size() + 12 * inputs.budget,
        prepare=lambda: known.update(hints=deepcopy(before)),
    )


def check_selection(inputs: Inputs, codes: SparseCodes, members: Tensor | None, select: str) -> list[Comparison]:
    """Nothing outside what is kept is larger than what is kept, and some kept values are right."""
    w, x, W, b = inputs.workload, inputs.x, inputs.W, inputs.b
    values, tokens, features = codes.entries()
    if len(torch.unique(tokens * w.F + features)) != len(values):
        raise AssertionError("an entry is kept twice")
    cut = values.new_zeros(w.B)
    if select == "token":
        full = torch.bincount(tokens, minlength=w.B) == w.k
        least = cut.scatter_reduce(0, tokens, values, "amin", include_self=False)
        cut = torch.where(full, least, cut)
    elif len(values) == inputs.budget:
        cut += values.min()
    if len(values) > inputs.budget or int(torch.bincount(tokens).max()) > (w.k if select == "token" else w.F):
        raise AssertionError(f"{len(values)} entries are kept, more than the budget")
    candidates = slice(None) if members is None else members
    rows, margin = W[candidates].float().t(), MARGIN * float(values.max())
    for at in torch.arange(w.B, device=x.device).split(CHECKED_TOKENS):
        is_larger = torch.relu(x[at].float() @ rows + b[candidates]) > cut[at, None] + margin
        if left := int((is_larger & (dense(codes, 0, at)[:, candidates] == 0)).sum()):
            raise AssertionError(f"{left} entries are larger than the smallest that is kept, and are not")
    at = some(len(values), CHECKED_ENTRIES, inputs.device)
    rows, columns = x[tokens[at]], W[features[at]]
    eager = torch.relu(torch.bmm(rows[:, None], columns[:, :, None]).flatten() + b[features[at]].to(x.dtype))
    exact = torch.relu((rows.double() * columns.double()).sum(1) + b[features[at]].double())
    return [comparison("values", values[at], eager, exact)]

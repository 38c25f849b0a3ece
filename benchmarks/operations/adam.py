"""RowAdam's update of a decoder: gradient rows of a pool, projection, Adam, renormalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.operations.operation import Inputs, Operation, some
from sampled_sae.impl.adam_step import AdamStep, Moments
from sampled_sae.testing import Comparison

LR, BETA1, BETA2, EPS, STEP = 1e-3, 0.9, 0.999, 1e-8, 10
CHECKED_ROWS = 512
# moments, their bias corrections, root, quotient and update of one element
FLOPS = 14


def eager_dense(W: Tensor, m: Tensor, v: Tensor, grad: Tensor, features: Tensor) -> Tensor:
    """In place, from the gradient rows of `features`: a dense gradient, and torch's fused Adam on all rows."""
    slope = torch.zeros_like(W).index_copy(0, features, grad)
    slope = slope - (slope * W).sum(1, keepdim=True) * W
    step = torch.full((), float(STEP), device=W.device)
    hyper = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": 0.0}
    torch._fused_adam_([W], [slope], [m], [v], [], [step], amsgrad=False, maximize=False, **hyper)
    return W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True))


def compiled_dense(W: Tensor, m: Tensor, v: Tensor, grad: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same written out for a compiler to fuse, as new tensors: written in place, torch 2.13's does not compile."""
    slope = torch.zeros_like(W).index_copy(0, features, grad)
    new, m, v = adam(W, m, v, slope - (slope * W).sum(1, keepdim=True) * W)
    return new / torch.linalg.vector_norm(new, dim=1, keepdim=True), m, v


def eager_decayed(W: Tensor, m: Tensor, v: Tensor, grad: Tensor, features: Tensor, last: Tensor) -> Tensor:
    """In place: the rows of `features` alone, after their moments have decayed for the steps they missed."""
    missed = (STEP - 1 - last[features]).to(W.dtype)[:, None]
    rows, first, second = W[features], m[features] * BETA1**missed, v[features] * BETA2**missed
    rows, first, second = adam(rows, first, second, grad - (grad * rows).sum(1, keepdim=True) * rows)
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    for target, source in ((W, rows), (m, first), (v, second)):
        target.index_copy_(0, features, source)
    return W


def adam(W: Tensor, m: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and moments after a step of torch.optim.Adam."""
    m = m.lerp(grad, 1 - BETA1)
    v = (v * BETA2).addcmul_(grad, grad, value=1 - BETA2)
    return W - LR / (1 - BETA1**STEP) * m / (v.sqrt() / (1 - BETA2**STEP) ** 0.5 + EPS), m, v


def row_adam(inputs: Inputs, mode: str) -> Operation:
    w, features, device = inputs.workload, inputs.members(4.0), inputs.device
    assert features is not None
    generator = torch.Generator(device).manual_seed(3)
    W = inputs.W.float().clone()
    m, v, grad = (1e-3 * torch.randn(n, w.d, generator=generator, device=device) for n in (w.F, w.F, len(features)))
    v.square_()
    step = torch.full((), float(STEP), device=device)
    last = torch.full((w.F,), STEP - 3, dtype=torch.int32, device=device) if mode == "decayed" else None
    arguments = (W, m, v, grad, features) if last is None else (W, m, v, grad, features, last)
    how = {"weight_decay": 0.0, "mode": mode, "project": True, "renormalize": True, "seed": 0}
    adam_step = AdamStep(number=step, factor=None, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS, **how)
    eager = eager_dense if last is None else eager_decayed

    def prepare() -> None:
        if last is not None:
            last.fill_(STEP - 3)

    def ours() -> Tensor:
        inputs.parts.row_adam_(W, Moments(m, v, last), grad, features, adam_step)
        return W

    def exact(at: Tensor) -> Tensor:
        """Rows `at` after the update, in float64."""
        here = torch.isin(features, at)
        rows: list[Any] = [t[at].double() for t in (W, m, v)]
        rows += [grad[here].double(), torch.searchsorted(at, features[here])]
        return compiled_dense(*rows)[0] if last is None else eager_decayed(*rows, last[at])

    def check() -> list[Comparison]:
        """Of some rows: both run on the state as they find it, and change it."""
        at = torch.unique(torch.cat((some(w.F, CHECKED_ROWS, device), features[:CHECKED_ROWS])))
        errors = []
        for call in (ours, lambda: eager(*arguments)):
            prepare()
            before = W[at].double()
            change = exact(at) - before
            errors.append(float((call()[at].double() - before - change).norm() / change.norm()))
        # the change is small beside the weight, whose rounding both must bear
        return [Comparison("weights", errors[0], errors[1], 2 * errors[1] + 4 * torch.finfo(torch.float32).eps)]

    rows = len(features) if mode == "decayed" else w.F
    return Operation(
        ours,
        check,
        bytes=4 * w.d * (6 * rows + len(features)) + 8 * len(features),
        flops=FLOPS * rows * w.d,
        eager=eager,
        arguments=lambda: arguments,
        eager_bytes=4 * 4 * rows * w.d,
        prepare=prepare,
        to_compile=compiled_dense if last is None else None,
    )

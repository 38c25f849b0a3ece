"""Adam on rows in place, with the decoder's projection and renormalisation around it.

`dense` walks over chunks of all rows; the gradient, zero but for the touched rows, lives in one small buffer. That
moves 24 bytes a parameter (weight and two moments, read and written) where a dense gradient makes it 32, and the
decoder's renormalisation finds its rows in cache. `lazy` and `decayed` take the touched rows out and put them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...support.argument_checks import HALF
from ...support.reused_memory import scratch
from ..adam_step import AdamStep, Moments
from ..decoder_rows import normalize_, without_growth

CHUNK_ELEMENTS = 1 << 19

Prepared = Callable[[Tensor, Tensor], Tensor]
RowChunk = tuple[slice | Tensor, Tensor, Tensor]


def row_adam_(weight: Tensor, moments: Moments, grad: Tensor, features: Tensor | None, step: AdamStep) -> None:
    """One step on weight [F, d] or [F] and its moments, in place.

    Args:
        grad: [T, d] or [T], the gradient of `features` [T], ascending; or of all rows, for None.
    """

    exp_avg, exp_avg_sq, last = moments
    chunks = every_row if step.mode == "dense" else touched_rows
    generator = None
    if exp_avg.dtype != weight.dtype:
        generator = torch.Generator(weight.device).manual_seed((int(step.number) << 8) + step.seed)
    number, lr = step.number.to(weight.device), float(step.lr)
    for rows, W, slope in chunks(weight, grad, features, preparing(weight, step)):
        taken = [rows_of(t, rows).to(weight.dtype) for t in (exp_avg, exp_avg_sq)]
        if last is not None and isinstance(rows, Tensor):
            missed = (step.number - 1 - last[rows]).to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
            for moment, beta in zip(taken, (step.beta1, step.beta2)):
                moment.mul_(beta**missed)
            last[rows] = int(step.number)
        torch._fused_adam_(
            [W],
            [slope],
            taken[:1],
            taken[1:],
            [],
            [number],
            lr=lr,
            beta1=step.beta1,
            beta2=step.beta2,
            weight_decay=step.weight_decay,
            eps=step.eps,
            amsgrad=False,
            maximize=False,
        )
        if step.renormalize:
            normalize_(W, step.layers)
        if isinstance(rows, Tensor):
            weight.index_copy_(0, rows, W)
        for target, moment in zip((exp_avg, exp_avg_sq), taken):
            put(target, rows, moment, generator)


def preparing(weight: Tensor, step: AdamStep) -> Prepared:
    """What makes of the gradient of some rows what Adam is given, in memory that serves again for the next rows."""
    shape = min(len(weight), rows_a_chunk(weight)), *weight.shape[1:]
    # one request for all chunks: between passes over memory each call of Python costs much
    room = scratch(weight, 2 if step.project else 1, *shape)

    def prepared(slope: Tensor, W: Tensor) -> Tensor:
        slope, out = slope.to(W.dtype), room[0, : len(W)]
        if step.factor is not None:
            slope = torch.mul(slope, step.factor, out=out)
        if not step.project:
            return slope
        if step.layers > 1:
            return without_growth(slope, W, step.layers)
        if W.dtype in HALF:  # whose products would be rounded before they are added up
            along = torch.linalg.vecdot(slope.float(), W.float())[:, None].to(W.dtype)
        else:
            along = torch.mul(slope, W, out=room[1, : len(W)]).sum(1, keepdim=True)
        return torch.addcmul(slope, along, W, value=-1, out=out)

    return prepared


def rows_of(t: Tensor, rows: slice | Tensor) -> Tensor:
    """Those rows of t: a view of a slice, a copy of a list."""
    return t[rows] if isinstance(rows, slice) else t.index_select(0, rows)


def put(target: Tensor, rows: slice | Tensor, moment: Tensor, generator: torch.Generator | None) -> None:
    """The moment back into its rows, unless it is a view of them."""
    if generator is not None:
        moment = stochastically_rounded(moment, target.dtype, generator)
    if isinstance(rows, Tensor):
        target.index_copy_(0, rows, moment)
    elif generator is not None:
        target[rows] = moment


def stochastically_rounded(t: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """t in bfloat16, up or down with the probability that makes the mean exact.

    The second moment moves by a thousandth a step, which rounding to the nearest of 8 bits would never show.
    """
    bits = t.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, t.shape, dtype=torch.int32, device=t.device, generator=generator)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(dtype)


def rows_a_chunk(weight: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // (weight.shape[1] if weight.dim() > 1 else 1))


def every_row(weight: Tensor, grad: Tensor, features: Tensor | None, prepared: Prepared) -> Iterator[RowChunk]:
    """(rows, their weights, their prepared gradient) chunk by chunk; zero in rows that are not in `features`."""
    size = rows_a_chunk(weight)
    starts = range(0, weight.shape[0], size)
    if features is None:
        for start in starts:
            rows = slice(start, start + size)
            yield rows, weight[rows], prepared(grad[rows], weight[rows])
        return
    edges = torch.searchsorted(features, torch.tensor([*starts, weight.shape[0]], device=features.device)).tolist()
    buffer = weight.new_zeros(min(size, weight.shape[0]), *weight.shape[1:])
    few = len(features) <= size
    if few:  # all at once: a row's weights are those of before until it is its turn
        grad = prepared(grad, weight.index_select(0, features))
    for start, first, end in zip(starts, edges, edges[1:]):
        rows = slice(start, min(start + size, weight.shape[0]))
        W, here = weight[rows], buffer[: rows.stop - start]
        if first == end:
            yield rows, W, here
            continue
        slope, touched, whole = grad[first:end], features[first:end] - start, end - first == len(here)
        if not few:
            slope = prepared(slope, W if whole else W.index_select(0, touched))
        if whole:
            yield rows, W, slope
            continue
        here.index_copy_(0, touched, slope)
        yield rows, W, here
        here.index_fill_(0, touched, 0)


def touched_rows(weight: Tensor, grad: Tensor, features: Tensor | None, prepared: Prepared) -> Iterator[RowChunk]:
    """The same for copies of the rows in `features` alone, without those whose gradient is zero throughout."""
    moving = (grad != 0).flatten(1).any(1) if grad.dim() > 1 else grad != 0
    for at in moving.nonzero().squeeze(1).split(rows_a_chunk(weight)):
        rows = at if features is None else features.index_select(0, at)
        W = weight.index_select(0, rows)
        yield rows, W, prepared(grad.index_select(0, at), W)


def union(features: list[Tensor], n_features: int) -> Tensor:
    """Every feature that occurs, ascending."""
    return torch.unique(torch.cat(features))

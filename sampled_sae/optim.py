"""`RowAdam`: clip, project, Adam and renormalise a SampledSAE in one walk over its rows.

Computes exactly torch.optim.Adam on the dense gradient (every row moves, touched or not) with the decoder's
projection and renormalisation around it. A gradient given as rows is never made dense: the walk goes over
chunks of rows whose gradient, zero but for the touched rows, lives in one small buffer. That moves 24 bytes a
parameter (weight and two moments, read and written) where a dense gradient makes it 32, and the decoder's
renormalisation finds its rows in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .memory import on_huge_pages
from .validate import check_number

if TYPE_CHECKING:
    from .sae import SampledSAE

CHUNK_ELEMENTS = 1 << 19


class RowGrads:
    """One parameter's gradient as (features, rows) pairs, or dense; W_enc is seen as W_enc.T."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name = name
        self.weight = parameter.detach().t() if name == "W_enc" else parameter.detach()
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.dense: Tensor | None = None
        if parameter.grad is not None:
            self.dense = (parameter.grad.t() if name == "W_enc" else parameter.grad).contiguous()

    def tensors(self) -> list[Tensor]:
        """Whatever holds gradient values, each once."""
        return [rows for _, rows in self.parts] + ([] if self.dense is None else [self.dense])

    def merge(self) -> None:
        """Several parts on the same features become one; rows beside a dense gradient are added to it."""
        if self.dense is not None:
            for features, rows in self.parts:
                self.dense.index_add_(0, features, rows.to(self.dense.dtype))
            self.parts = []
        if len(self.parts) > 1:
            features, inverse = torch.unique(torch.cat([f for f, _ in self.parts]), return_inverse=True)
            values = torch.cat([rows for _, rows in self.parts])
            self.parts = [(features, values.new_zeros(len(features), *values.shape[1:]).index_add_(0, inverse, values))]


class RowAdam(Optimizer):
    """Adam for a `SampledSAE`, with `cfg.row_grads=True` or without.

    One step: clip the global gradient norm; remove from W_dec's gradient the part parallel to each decoder
    row; Adam; unit decoder rows. Equivalent to `clip_grad_norm_(sae.parameters(), clip)`,
    `sae.project_decoder_grad()`, `torch.optim.Adam(sae.parameters(), fused=True).step()`,
    `sae.normalize_decoder()`.

    Args:
        sae: the SampledSAE; one parameter group for each parameter, so that each may have its own lr.
        lr, betas, eps, weight_decay: as in torch.optim.Adam.
        clip: largest global gradient norm, None for no clipping.

    Attributes:
        grad_norm: the global norm of the last step's gradient before clipping, 0-dim tensor.
    """

    def __init__(
        self,
        sae: SampledSAE,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
    ) -> None:
        check_number("lr", lr, 0, None)
        check_number("eps", eps, 0, None)
        check_number("weight_decay", weight_decay, 0, None)
        for i, beta in enumerate(betas):
            check_number(f"betas[{i}]", beta, 0, 1)
            if beta == 1:
                raise ValueError(f"betas[{i}]={beta!r}: must be below 1")
        if clip is not None:
            check_number("clip", clip, 0, None)
        groups = [{"params": [p], "name": name} for name, p in sae.named_parameters()]
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.sae = sae
        self.clip = clip
        self.grad_norm: Tensor | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.sae.row_grads = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = self._collect()
        factor = self._clip_factor([g for grad in grads.values() for g in grad.tensors()])
        for group in self.param_groups:
            grad = grads[group["name"]]
            if grad.parts or grad.dense is not None:
                self._adam(group, grad, factor)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, whatever memory layout the moments were saved in."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            state = self.state.get(group["params"][0], {})
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    moment = state[name].t() if group["name"] == "W_enc" else state[name]
                    state[name] = moment.contiguous().t() if group["name"] == "W_enc" else moment.contiguous()

    def _collect(self) -> dict[str, RowGrads]:
        grads = {g["name"]: RowGrads(g["name"], g["params"][0]) for g in self.param_groups}
        for part in self.sae.row_grads:
            if part.rows.grad is not None:
                grads[part.name].parts.append((part.features, part.rows.grad))
        for grad in grads.values():
            grad.merge()
        return grads

    def _clip_factor(self, tensors: list[Tensor]) -> float:
        """What the gradients are multiplied by, so that their global norm is at most `clip`."""
        if not tensors:
            return 1.0
        norms = [torch.linalg.vector_norm(t).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
        self.grad_norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.clip is None:
            return 1.0
        return min(1.0, self.clip / (float(self.grad_norm) + 1e-6))

    def _adam(self, group: dict[str, Any], grad: RowGrads, factor: float) -> None:
        parameter = group["params"][0]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                zeros = on_huge_pages(grad.weight, *grad.weight.shape).zero_()
                state[name] = zeros.t() if grad.name == "W_enc" else zeros
        state["step"] += 1
        moments = [state[n].t() if grad.name == "W_enc" else state[n] for n in ("exp_avg", "exp_avg_sq")]
        # The fused kernel goes through memory in order: a weight of another layout is worked on as a copy.
        weights = grad.weight.contiguous()
        for rows, slope in walk(grad, factor):
            weight = weights[rows]
            torch._fused_adam_(
                [weight],
                [slope],
                [moments[0][rows]],
                [moments[1][rows]],
                [],
                [state["step"].to(weight.device)],
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            if grad.name == "W_dec":
                weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min_(1e-12))
        if weights is not grad.weight:
            grad.weight.copy_(weights)


def walk(grad: RowGrads, factor: float) -> Iterable[tuple[slice, Tensor]]:
    """(rows, their gradient times `factor`, projected for W_dec) chunk by chunk; zero in untouched rows."""
    weight = grad.weight
    width = weight.shape[1] if weight.dim() > 1 else 1
    step = max(1, CHUNK_ELEMENTS // width)
    starts = range(0, weight.shape[0], step)
    if grad.dense is not None:
        for start in starts:
            rows = slice(start, start + step)
            yield rows, prepared(grad.name, grad.dense[rows].mul_(factor), weight[rows])
        return
    (features, values), *_ = grad.parts
    edges = torch.searchsorted(features, torch.tensor([*starts, weight.shape[0]], device=features.device)).tolist()
    buffer = weight.new_zeros(min(step, weight.shape[0]), *weight.shape[1:])
    for start, first, last in zip(starts, edges, edges[1:]):
        here = buffer[: min(step, weight.shape[0] - start)]
        rows = slice(start, start + len(here))
        touched = features[first:last] - start
        whole = len(touched) == len(here)
        W = weight[rows] if whole else weight[rows].index_select(0, touched)
        slope = prepared(grad.name, values[first:last].mul_(factor), W).to(weight.dtype)
        if whole:
            yield rows, slope
            continue
        here.index_copy_(0, touched, slope)
        yield rows, here
        here.index_fill_(0, touched, 0)


def prepared(name: str, slope: Tensor, weight: Tensor) -> Tensor:
    """For W_dec the part of each row orthogonal to the unit decoder row, otherwise `slope` itself."""
    if name != "W_dec":
        return slope
    W = weight.to(slope.dtype)
    return slope.addcmul_((slope * W).sum(1, keepdim=True), W, value=-1)

"""The optimizer's step on rows by one kernel a parameter, without a look at the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import row_adam as kernel
from ..adam_step import Rule
from ..torch import row_adam as torch_row_adam
from .layer import gradient_rows


def row_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    features: Tensor | None,
    step: Tensor,
    factor: Tensor | None,
    last: Tensor | None,
    seed: int,
    rule: Rule,
) -> None:
    """As torch_impl's, which serves for weights that are not float32."""
    if weight.dtype != torch.float32:
        torch_row_adam.row_adam_(weight, exp_avg, exp_avg_sq, grad, features, step, factor, last, seed, rule)
        return
    kernel.row_adam_(
        weight,
        exp_avg,
        exp_avg_sq,
        grad,
        features,
        step,
        factor=factor,
        lr=rule.lr,
        beta1=rule.beta1,
        beta2=rule.beta2,
        eps=rule.eps,
        weight_decay=rule.weight_decay,
        mode=rule.mode,
        last=last,
        project=rule.project,
        renormalize=rule.renormalize,
        seed=seed,
    )


def union(features: list[Tensor], n_features: int) -> Tensor:
    """Every feature that occurs and, to a size that follows from the lengths, others: ascending."""
    return gradient_rows(torch.cat(features), None, n_features)

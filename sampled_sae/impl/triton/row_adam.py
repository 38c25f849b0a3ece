"""The optimizer's step on rows by one kernel a parameter, without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import row_adam as kernel
from ..adam_step import AdamStep, Moments
from ..torch import row_adam as torch_form
from .entries import gradient_rows


def row_adam_(weight: Tensor, moments: Moments, grad: Tensor, features: Tensor | None, step: AdamStep) -> None:
    """As the torch form's, which serves for weights that are not float32."""
    if weight.dtype != torch.float32:
        torch_form.row_adam_(weight, moments, grad, features, step)
        return
    kernel.row_adam_(
        weight,
        moments.exp_avg,
        moments.exp_avg_sq,
        grad,
        features,
        step.number,
        factor=step.factor,
        lr=step.lr,
        beta1=step.beta1,
        beta2=step.beta2,
        eps=step.eps,
        weight_decay=step.weight_decay,
        mode=step.mode,
        last=moments.last,
        project=step.project,
        renormalize=step.renormalize,
        copy=step.copy,
        seed=step.seed,
    )


def union(features: list[Tensor], n_features: int) -> Tensor:
    """Every feature that occurs and, to a size that follows from the lengths, others: ascending."""
    return gradient_rows(torch.cat(features), None, n_features)

"""The optimizer's step on rows by one kernel a parameter, without a host synchronisation.

The kernel keeps unit rows. The decoder rows of several layers are projected before it and normalised after it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...kernels import row_adam as kernel
from ..adam_step import AdamStep, Moments
from ..decoder_rows import normalize_, without_growth
from ..torch import row_adam as torch_form
from .entries import gradient_rows


def row_adam_(weight: Tensor, moments: Moments, grad: Tensor, features: Tensor | None, step: AdamStep) -> None:
    """As the torch form's, which serves for weights that are not float32."""
    if weight.dtype != torch.float32:
        torch_form.row_adam_(weight, moments, grad, features, step)
        return
    if step.layers > 1 and step.project and step.renormalize:
        of_layers_(weight, moments, grad, features, step)
        return
    how = {name: value for name, value in vars(step).items() if name not in ("number", "layers")}
    exp_avg, exp_avg_sq, last = moments
    kernel.row_adam_(weight, exp_avg, exp_avg_sq, grad, features, step.number, last=last, **how)


def of_layers_(weight: Tensor, moments: Moments, grad: Tensor, features: Tensor | None, step: AdamStep) -> None:
    """`row_adam_` on the decoder [F, layers * d] of a crosscoder."""
    before = weight if features is None else weight.index_select(0, features)
    slope = without_growth(grad.to(weight.dtype), before, step.layers)
    row_adam_(weight, moments, slope, features, replace(step, project=False, renormalize=False))
    if step.mode == "dense":
        normalize_(weight, step.layers)
        return
    # rows without gradient stand still, to the bit
    after = weight if features is None else weight.index_select(0, features)
    moved = (slope != 0).any(1, keepdim=True)
    after = torch.where(moved, normalize_(after.clone(), step.layers), after)
    if features is None:
        weight.copy_(after)
    else:
        weight.index_copy_(0, features, after)


def union(features: list[Tensor], n_features: int) -> Tensor:
    """Every feature that occurs and, to a size that follows from the lengths, others: ascending."""
    return gradient_rows(torch.cat(features), None, n_features)

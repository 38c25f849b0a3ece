"""The reconstruction and its squared errors as one function: fewer passes over [B, d], and less memory made anew."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...support.once_differentiable import once_differentiable
from ...support.reused_memory import scratch


def squared_errors(raw: Tensor, bias: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    """(raw + bias, its squared error for each token): [B, d] and [B], in the dtype of `raw`.

    Equivalent to `x_hat = raw + bias` and `(x_hat - target).square().sum(-1)`, to the bit.
    """
    if torch.compiler.is_compiling():  # which makes passes of its own
        x_hat = raw if bias is None else raw + bias.to(raw.dtype)
        return x_hat, errors_of_tokens(target, x_hat)
    return SquaredErrors.apply(raw, bias, target)


def errors_of_tokens(x: Tensor, x_hat: Tensor) -> Tensor:
    """||x_i - x_hat_i||^2 of each token, [B]; equivalent to `(x - x_hat).square().sum(-1)`.

    In this order the gradient of x_hat has the sign of the residual, and no pass has to turn it.
    """
    return (x_hat - x.to(x_hat.dtype)).square().sum(-1)


class SquaredErrors(torch.autograd.Function):
    """See `squared_errors`."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, bias: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
        x_hat = raw.clone() if bias is None else raw + bias.to(raw.dtype)
        difference = torch.sub(x_hat, target.to(x_hat.dtype), out=scratch(x_hat, *x_hat.shape))
        ctx.set_materialize_grads(False)
        ctx.dtypes = None if bias is None else bias.dtype, target.dtype
        errors = torch.mul(difference, difference, out=scratch(difference, *difference.shape)).sum(-1)
        ctx.save_for_backward(difference, errors)
        return x_hat, errors

    @staticmethod
    @partial(once_differentiable, also_of=lambda ctx: ctx.saved_tensors[1:])
    def backward(ctx: Any, d_x_hat: Tensor | None, d_errors: Tensor | None) -> tuple[Tensor | None, ...]:
        difference, _ = ctx.saved_tensors
        bias_dtype, target_dtype = ctx.dtypes
        d_raw, d_bias, d_target = d_x_hat, None, None
        if d_errors is not None:
            of_errors = torch.mul(difference, (2 * d_errors)[:, None], out=scratch(difference, *difference.shape))
            d_raw = of_errors if d_x_hat is None else d_x_hat + of_errors
            if ctx.needs_input_grad[2]:
                d_target = -of_errors.to(target_dtype)
        if ctx.needs_input_grad[1] and d_raw is not None:
            d_bias = d_raw.sum(0).to(bias_dtype)
        return d_raw, d_bias, d_target

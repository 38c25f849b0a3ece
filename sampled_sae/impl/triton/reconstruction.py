"""The reconstruction and its squared errors as one operator: a pass forward, a pass back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import reconstruction as kernel
from ...support.once_differentiable import no_second_derivative
from .products import note_rounded


@torch.library.custom_op("sampled_sae::squared_errors", mutates_args=())
def squared_errors(raw: Tensor, bias: Tensor | None, target: Tensor, round_back: bool = False) -> tuple[Tensor, Tensor]:
    """(raw + bias, its squared error for each token): fp32 [B, d] and [B].

    round_back: the gradient of raw is to be a factor of products in bf16, and is rounded as it is written.
    """
    return kernel.squared_errors(raw, None if bias is None else bias.float(), target)


@squared_errors.register_fake
def _(raw: Tensor, bias: Tensor | None, target: Tensor, round_back: bool = False) -> tuple[Tensor, Tensor]:
    return raw.new_empty(raw.shape), raw.new_empty(raw.shape[0])


@torch.library.custom_op("sampled_sae::squared_errors_backward", mutates_args=())
def squared_errors_backward(
    d_errors: Tensor | None, d_x_hat: Tensor | None, x_hat: Tensor, target: Tensor, round_back: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(d raw, d bias) in fp32, and d raw in bf16 or an empty tensor."""
    d_errors = None if d_errors is None else d_errors.contiguous()  # that of a mean is expanded
    low = x_hat.new_empty(x_hat.shape if round_back else 0, dtype=torch.bfloat16)
    copy = low if round_back else None
    return *kernel.squared_errors_backward(d_errors, d_x_hat, x_hat, target, copy), low


@squared_errors_backward.register_fake
def _(
    d_errors: Tensor | None, d_x_hat: Tensor | None, x_hat: Tensor, target: Tensor, round_back: bool
) -> tuple[Tensor, Tensor, Tensor]:
    low = x_hat.new_empty(x_hat.shape if round_back else 0, dtype=torch.bfloat16)
    return x_hat.new_empty(x_hat.shape), x_hat.new_empty(x_hat.shape[1]), low


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, bias, target, ctx.round_back = inputs
    ctx.save_for_backward(output[0], target)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(ctx: Any, d_x_hat: Tensor | None, d_errors: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_x_hat is None and d_errors is None:
        return None, None, None, None
    x_hat, target = ctx.saved_tensors
    d_raw, d_bias, low = squared_errors_backward(d_errors, d_x_hat, x_hat, target, ctx.round_back)
    if ctx.round_back:
        note_rounded(d_raw, low)
    d_target = None
    if ctx.needs_input_grad[2] and d_errors is not None:
        d_target = (2 * d_errors[:, None] * (target.float() - x_hat)).to(target.dtype)
    return d_raw, d_bias.to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None, d_target, None


squared_errors.register_autograd(_gradient, setup_context=_context)
squared_errors_backward.register_autograd(no_second_derivative)

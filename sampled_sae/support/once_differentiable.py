"""Backward passes that have no derivative of their own, which say so wherever one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function

MESSAGE = (
    "a second derivative was asked for, which only the dense forms have: impl='reference', or an SAE that is not "
    "accelerated"
)


def no_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    """The gradient of a gradient."""
    raise RuntimeError(MESSAGE)


class NoSecondDerivative(torch.autograd.Function):
    """A gradient as it is; an error where the gradients that it was made of are asked for theirs."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *made_of: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    backward = staticmethod(no_second_derivative)


def once_differentiable(
    backward: Callable[..., Any], also_of: Callable[[Any], tuple[Tensor, ...]] = lambda _: ()
) -> Callable[..., Any]:
    """As torch's, whose error `torch.autograd.grad` never meets: its gradients lead back to no input, and what they
    would have added is left out in silence.

    Args:
        also_of: saved inputs or outputs that the gradients depend on, whatever gradients come in.
    """
    once = function.once_differentiable(backward)

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        made = once(ctx, *grads)
        if not torch.is_grad_enabled():
            return made
        made_of = [g for g in (*grads, *also_of(ctx)) if isinstance(g, Tensor) and g.requires_grad]
        if not made_of:
            return made
        given = made if isinstance(made, tuple) else (made,)
        return tuple(g if g is None else NoSecondDerivative.apply(g.detach(), *made_of) for g in given)

    return wrapper

"""Gradient rows: the touched features' part of a [F, d] gradient, dense only where the caller needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..support.once_differentiable import once_differentiable
from ..support.reused_memory import Workspace
from .rounded_weights import RoundedWeights


class Rows(torch.autograd.Function):
    """W[features], which is to be read, or else an `empty_receiver`; the gradient of W is zero outside them."""

    @staticmethod
    def forward(
        ctx: Any, W: Tensor, features: Tensor, dtype: torch.dtype, workspace: Workspace, is_read: bool
    ) -> Tensor:
        ctx.save_for_backward(features)
        ctx.like, ctx.shape, ctx.workspace = W.new_empty(0), W.shape, workspace
        return W.index_select(0, features).to(dtype) if is_read else empty_receiver(W, features, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The dense gradient of W from that of its rows, whose features ascend."""
        (features,) = ctx.saved_tensors
        grad = grad.to(ctx.like.dtype)
        if len(features) != ctx.shape[0]:
            dense = ctx.workspace.empty(ctx.like, *ctx.shape).zero_()
            grad = dense.index_copy_(0, features, grad)
        return grad, None, None, None, None


def empty_receiver(W: Tensor, features: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the shape of W[features] without memory, to receive their gradient; its values must not be read."""
    return W.new_zeros((), dtype=dtype).expand(len(features), *W.shape[1:])


@dataclass
class RowGradient:
    """The gradient of some rows of one parameter, after `backward`.

    Attributes:
        name: "W_enc", "b_enc" or "W_dec"; the rows of W_enc are those of W_enc.T.
        features: int64 [T], ascending.
        rows: the [T, d] or [T] leaf whose `.grad` is the gradient.
    """

    name: str
    features: Tensor
    rows: Tensor


class KnownNorm(NamedTuple):
    """norm: 0-dim, of the gradient in this memory while that has this version."""

    norm: Tensor
    storage: torch.UntypedStorage
    version: int


def note_norm(receiver: Tensor, gradient: Tensor, norm: Tensor) -> None:
    """What the norm is of the gradient that a RowGradient's `rows` is about to receive; no other tensor is told, nor
    one of another dtype, whose gradient is a copy that is rounded."""
    plain = type(gradient) is Tensor and gradient.dtype == receiver.dtype  # and not a compiler's
    if plain and hasattr(receiver, "known_norm"):
        # its memory, not itself: autograd copies a gradient that somebody else holds
        receiver.known_norm = KnownNorm(norm, gradient.untyped_storage(), gradient._version)


def norm_of(receiver: Tensor) -> Tensor:
    """Of its gradient, 0-dim; without a pass over it where it is known and the gradient is of the same version.

    `grad.data` and exchanges of torch.distributed change a gradient and not its version: `RowAdam` says so.
    """
    grad, known = receiver.grad, getattr(receiver, "known_norm", None)
    assert grad is not None
    if known is not None and grad.untyped_storage()._cdata == known.storage._cdata and grad._version == known.version:
        return known.norm
    return torch.linalg.vector_norm(grad)


class RowSource:
    """Hands out rows of a parameter to compute with, and decides where their gradients go.

    keep=False: to `parameter.grad`, dense, as autograd users expect. keep=True: to `self.gradients`, rows only.
    Gradients lie in `workspace`, whose memory serves again when they are gone. `rounded` has the weights in the 16 bits
    of products.
    """

    def __init__(
        self, keep: bool = False, workspace: Workspace | None = None, rounded: RoundedWeights | None = None
    ) -> None:
        self.keep = keep
        self.workspace = workspace if workspace is not None else Workspace()
        self.rounded = rounded if rounded is not None else RoundedWeights()
        self.gradients: list[RowGradient] = []

    def gather(self, name: str, W: Tensor, features: Tensor, dtype: torch.dtype) -> Tensor:
        """W[features] in `dtype`."""
        if not self.keep:
            return Rows.apply(W, features, dtype, self.workspace, True)
        return self._leaf(name, W, features, W.detach().index_select(0, features).to(dtype))

    def receiver(self, name: str, W: Tensor, features: Tensor, dtype: torch.dtype) -> Tensor:
        """A place of the shape of W[features] for the gradient alone; it holds no values."""
        if not self.keep:
            return Rows.apply(W, features, dtype, self.workspace, False)
        return self._leaf(name, W, features, empty_receiver(W, features, dtype))

    def _leaf(self, name: str, W: Tensor, features: Tensor, rows: Tensor) -> Tensor:
        if W.requires_grad and torch.is_grad_enabled():
            rows.requires_grad_()
            if not torch.compiler.is_compiling():
                rows.known_norm = None  # type: ignore[attr-defined]
            self.gradients.append(RowGradient(name, features, rows))
        return rows

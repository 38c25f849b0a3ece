"""What an optimizer of rows works with: a parameter's gradient, as rows of some features or dense, and the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .row_gradients import RowGradient, norm_of

Union = Callable[[list[Tensor], int], Tensor]


class Moments(NamedTuple):
    """Of one parameter, features first: exp_avg and exp_avg_sq as in torch.optim.Adam.

    last: int32 [F], for mode "decayed": the step in which each row moved last.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    last: Tensor | None


@dataclass(frozen=True)
class AdamStep:
    """How the rows of one parameter are updated, as in RowAdam; `project` and `renormalize` are for the decoder.

    layers: 1 where that keeps rows of unit norm; else the norms of so many parts of each row add up to 1.
    number: 0-dim, 1 in the first step. lr: a number, or 0-dim float32 where the host is not to know it. factor: 0-dim,
    multiplies the gradient; None for 1. seed: with the number, of the stochastic rounding of 16-bit moments beside a
    wider weight. copy: what moves is rounded into it too, as the Triton form can do; None for nothing.
    """

    number: Tensor
    factor: Tensor | None
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    mode: str
    project: bool
    renormalize: bool
    seed: int
    layers: int = 1
    copy: Tensor | None = None


class ParameterGradient:
    """(features, rows) pairs that `merge` makes one, or a dense tensor; W_enc is seen as W_enc.T."""

    def __init__(self, name: str, weight: Tensor, dense: Tensor | None) -> None:
        self.name = name
        self.weight = rows_first(name, weight)
        self.parts: list[tuple[Tensor, Tensor]] = []
        self._receivers: list[Tensor] = []
        self.dense = None if dense is None else rows_first(name, dense).contiguous()

    def __bool__(self) -> bool:
        return bool(self.parts) or self.dense is not None

    def add(self, part: RowGradient) -> None:
        """One more part."""
        assert part.rows.grad is not None
        self.parts.append((part.features, part.rows.grad))
        self._receivers.append(part.rows)

    def norm(self) -> Tensor:
        """Of `values`, 0-dim."""
        if self.dense is None and len(self._receivers) == 1:
            return norm_of(self._receivers[0])
        return torch.linalg.vector_norm(self.values())

    def values(self) -> Tensor:
        """What holds gradient values, after `merge`."""
        return self.dense if self.dense is not None else self.parts[0][1]

    def features(self) -> Tensor | None:
        """The features of `values`, ascending; None for all of them."""
        return None if self.dense is not None else self.parts[0][0]

    def merge(self, union: Union) -> None:
        """Several parts become one, on the `union` of their features; rows beside a dense gradient are added to it."""
        if self.dense is not None:
            for features, rows in self.parts:  # not in place: it may be the parameter's own
                self.dense = self.dense.index_add(0, features, rows.to(self.dense.dtype))
            self.parts = []
        if len(self.parts) > 1:
            features = union([f for f, _ in self.parts], self.weight.shape[0])
            values = self.parts[0][1].new_zeros(len(features), *self.weight.shape[1:])
            for some, rows in self.parts:
                values.index_add_(0, torch.searchsorted(features, some), rows)
            self.parts = [(features, values)]


def rows_first(name: str, t: Tensor) -> Tensor:
    """A tensor of the shape of parameter `name` with features first, and back."""
    return t.t() if name == "W_enc" else t

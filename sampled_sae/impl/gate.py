"""Rules that look at one activation at a time, as a floor for each feature and what becomes of what lies above it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..codes import Entries


class Gate(NamedTuple):
    """An entry z of x W^T is let through where z + bias > 0; its activation is then relu(z * gain + shift).

    bias: b_gate [F]. gain: exp(r_mag) [F], > 0. shift: b_mag [F].
    """

    bias: Tensor
    gain: Tensor
    shift: Tensor

    def to(self, dtype: torch.dtype) -> Gate:
        return Gate(self.bias.to(dtype), self.gain.to(dtype), self.shift.to(dtype))


def floor_of(threshold: Tensor, gate: Gate | None, dtype: torch.dtype) -> Tensor:
    """[1] or [F]: an entry counts where (x W^T + b) * scale lies strictly above it.

    z + b_gate > 0 is z > -b_gate in floating point too.
    """
    return threshold.detach().clamp_min(0).reshape(-1).to(dtype) if gate is None else -gate.bias.detach().to(dtype)


def magnitudes(found: Entries, threshold: Tensor, gate: Gate | None) -> Entries:
    """Of entries z above their floor the activations above the threshold, which they are without a gate."""
    if gate is None:
        return found
    values, tokens, features = found
    _, gain, shift = (t.detach().to(values.dtype) for t in gate)
    a = values * gain.index_select(0, features) + shift.index_select(0, features)
    least = threshold.detach().clamp_min(0)
    at = (a > (least if least.dim() == 0 else least.index_select(0, features))).nonzero().squeeze(1)
    return Entries(a, tokens, features).at(at)


def keep_above_(z: Tensor, threshold: Tensor, gate: Gate | None) -> Tensor:
    """z [T, F], (x W^T + b) * scale of some tokens, becomes its activations above the threshold, all others 0."""
    least = threshold.detach().clamp_min(0)
    if gate is None:
        return z.relu_().mul_(z > least)
    bias, gain, shift = (t.detach().to(z.dtype) for t in gate)
    is_open = z > -bias
    z.mul_(gain).add_(shift)
    return z.relu_().mul_(is_open.logical_and_(z > least))

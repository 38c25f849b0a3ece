"""The gate of a gated SAE: which entries are active, and their magnitudes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Gate(NamedTuple):
    """An entry z of x W^T is let through where z + bias > 0; its activation is then relu(z * gain + shift).

    bias: b_gate [F]. gain: exp(r_mag) [F], > 0. shift: b_mag [F].
    """

    bias: Tensor
    gain: Tensor
    shift: Tensor

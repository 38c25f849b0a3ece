"""Second derivatives, which the operators do not have."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """The gradient of a gradient operator."""
    raise RuntimeError(
        "sampled_sae: the Triton operators have no second derivative; use impl='reference' for double backward"
    )

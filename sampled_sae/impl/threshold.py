"""The threshold of evaluation mode: where a module keeps it, whether it can be relied on, and how training moves it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..support.argument_checks import HALF
from ..support.cuda_graphs import capturing
from .encoder import Encoder
from .hints import Rule
from .interface import Implementation

# `calibrated_at` of a threshold that was calibrated for another set of features.
VOID = -1
NEVER_SET = "sae.threshold was never set: train the SAE or call sae.calibrate(x) first"
RUNNING_MEAN = (
    "sae.threshold is the running mean of training alone, which lets more than k features fire (for a small l it tends "
    "to 0): call sae.calibrate(x) first"
)
OF_ANOTHER_SET = "sae.threshold is not for the features that cfg.inference looks at: call sae.calibrate(x) first"

Self = TypeVar("Self", bound="ThresholdModule")


def is_set(sae: ThresholdModule) -> bool:
    """Whether training, a calibration, a file or the caller has given it a value: it starts as 0, after 0 steps."""
    return int(sae.threshold_steps) > 0 or float(sae.threshold) > 0


def fault(sae: ThresholdModule) -> str | None:
    """Why evaluation by the threshold is not to be relied on; None for a calibrated one."""
    if not is_set(sae):
        return NEVER_SET
    if int(sae.calibrated_at) == VOID:
        return OF_ANOTHER_SET
    return None if int(sae.calibrated_at) == int(sae.threshold_steps) else RUNNING_MEAN


def between(parts: Implementation, encoder: Encoder, l0: float, members: Tensor | None, n_features: int) -> Tensor:
    """What l0 activations a token are above on average, or all where they are fewer; 0-dim, on the CPU, float64.

    members: int64 [P], those of the `n_features` features that count which are here; None for all.
    """
    n_tokens = encoder.operands.whole_shape[0]
    n = round(n_tokens * l0)
    budget = min(n + 1, n_tokens * n_features)
    codes = parts.select(encoder, members, Rule(budget / n_tokens))
    smallest = float(parts.totals.smallest(codes)) if parts.totals.count(codes) > n else 0.0
    return torch.tensor(smallest, dtype=torch.float64)


def set_calibrated(sae: ThresholdModule, value: Tensor) -> None:
    """Sets it to a value that gives the L0 that is wanted."""
    sae.threshold.copy_(value)
    sae.threshold_steps.clamp_(min=1)
    sae.calibrated_at.copy_(sae.threshold_steps)


def void(sae: ThresholdModule) -> None:
    """Marks it as one for other features than those that evaluation looks at from now on."""
    sae.calibrated_at.fill_(VOID)
    sae._look_again()


@torch.no_grad()
def move(sae: ThresholdModule, smallest: Tensor, decay: float) -> None:
    """One training step of a running mean of the smallest kept activation that starts at its first value."""
    smallest = smallest.to(sae.threshold.dtype)
    moved = sae.threshold.lerp(smallest, 1 - decay)
    moved = torch.where(sae.threshold_steps == 0, smallest, moved)
    found = smallest < torch.inf
    sae.threshold.copy_(torch.where(found, moved, sae.threshold))
    sae.threshold_steps.add_(found)


class ThresholdModule(nn.Module):
    """Buffers `threshold`, `threshold_steps` (training steps behind it) and `calibrated_at` (the steps when it was last
    calibrated), all 0-dim, and the warning where evaluation goes by an uncalibrated one."""

    threshold: Tensor
    threshold_steps: Tensor
    calibrated_at: Tensor

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """The threshold is of at least float32, whatever the `dtype` of the weights."""
        super().__init__()
        exact = torch.promote_types(dtype, torch.float32)
        self.register_buffer("threshold", torch.zeros((), dtype=exact, device=device))
        for name in ("threshold_steps", "calibrated_at"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        self._looked = self._warned = False

    def _warn_before_use(self) -> None:
        """Once that the threshold is uncalibrated; a calibrated one is looked at once after a training."""
        if self._looked or capturing():
            return
        self._looked = True
        found = fault(self)
        if found is not None:
            self._warned = True
            warnings.warn(found, stacklevel=4)

    def _look_again(self) -> None:
        """The threshold may be another when it is used next."""
        self._looked = self._warned

    def train(self: Self, mode: bool = True) -> Self:
        """As in torch."""
        if mode:
            self._look_again()
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state without `calibrated_at`, of an earlier version or a peer, counts as calibrated."""
        self._look_again()
        if prefix + "threshold_steps" in state_dict:
            state_dict.setdefault(prefix + "calibrated_at", state_dict[prefix + "threshold_steps"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to(bfloat16)` and the like leave the threshold in float32: rounded, it would miss its L0."""
        threshold = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype in HALF:
            self.threshold = threshold.to(self.threshold.device, torch.float32)
        return self

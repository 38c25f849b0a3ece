"""The threshold of evaluation mode: whether it can be relied on, and the running mean that training moves."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from .codes import SparseCodes
from .impl.encoder import Encoder
from .impl.hints import Rule
from .support.cuda_graphs import capturing

if TYPE_CHECKING:
    from .sae import SampledSAE

NEVER_SET = "sae.threshold was never set: train the SAE or call sae.calibrate(x) first"
RUNNING_MEAN = (
    "sae.threshold is the running mean of training alone, which lets more than k features fire (for a small l it tends "
    "to 0): call sae.calibrate(x) first"
)


def is_set(sae: SampledSAE) -> bool:
    """Whether training, a calibration, a file or the caller has given it a value: it starts as 0, after 0 steps."""
    return int(sae.threshold_steps) > 0 or float(sae.threshold) > 0


def fault(sae: SampledSAE) -> str | None:
    """Why evaluation by the threshold is not to be relied on; None for a calibrated one."""
    if not is_set(sae):
        return NEVER_SET
    return None if int(sae.calibrated_at) == int(sae.threshold_steps) else RUNNING_MEAN


def calibrate(sae: SampledSAE, encoder: Encoder, l0: float) -> None:
    """Sets it between the activations so that l0 a token are above it on average, or all where they are fewer."""
    n_tokens = encoder.shape[0]
    n = round(n_tokens * l0)
    budget = min(n + 1, n_tokens * sae.cfg.d_sae)
    codes = sae._parts.select(encoder, None, Rule(budget / n_tokens))
    sae.threshold.fill_(float(codes.smallest()) if codes.count() > n else 0.0)
    sae.threshold_steps.clamp_(min=1)
    sae.calibrated_at.copy_(sae.threshold_steps)


class ThresholdNotice:
    """Warns once a module that its threshold is uncalibrated; a calibrated one is looked at once after a training."""

    def __init__(self) -> None:
        self._looked = self._warned = False

    def look_again(self) -> None:
        """The threshold may be another when it is used next."""
        self._looked = self._warned

    def before_use(self, sae: SampledSAE) -> None:
        if self._looked or capturing():
            return
        self._looked = True
        found = fault(sae)
        if found is not None:
            self._warned = True
            warnings.warn(found, stacklevel=4)


@torch.no_grad()
def move(sae: SampledSAE, codes: SparseCodes) -> None:
    """One training step of a running mean of the smallest kept activation that starts at its first value."""
    smallest = codes.smallest().to(sae.threshold.dtype)
    moved = sae.threshold.lerp(smallest, 1 - sae.cfg.threshold_decay)
    moved = torch.where(sae.threshold_steps == 0, smallest, moved)
    found = smallest < torch.inf
    sae.threshold.copy_(torch.where(found, moved, sae.threshold))
    sae.threshold_steps.add_(found)

"""Not a step: a trained SampledSAE's `encode_sparse`, by a threshold of one L0, without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.candidate import Candidate, Setup, Weights


class Library(Candidate):
    """Calibrated on the first batch, where the threshold keeps what the rule of batches does; that error is checked."""

    def __init__(self, setup: Setup, weights: Weights, **rule: Any) -> None:
        self.setup = setup
        self.sae = weights.sae(setup.k, **rule).eval()

    @torch.no_grad()
    def step(self, x: Tensor) -> float:
        self.steps += 1
        if self.steps == 1:
            self.sae.calibrate(x)
            return float(self.sae(x).mse)
        self.sae.encode_sparse(x)
        return float("nan")

    def tensors(self) -> Weights:
        return Weights(self.sae.W_enc.t(), self.sae.b_enc, self.sae.W_dec, self.sae.b_dec)

"""SampledSAE with RowAdam on row gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.candidate import Candidate, Setup, Weights
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig


class Library(Candidate):
    def __init__(self, setup: Setup, weights: Weights, mode: str, rule: dict[str, Any]) -> None:
        self.setup = setup
        cfg = SampledSAEConfig(
            d_in=setup.d, d_sae=setup.F, k=setup.k, dead_after=setup.dead_after, row_grads=True, **rule
        )
        self.sae = weights.copy_to(SampledSAE(cfg, device=setup.device))
        self.optimizer = RowAdam(self.sae, lr=setup.lr, mode=mode)
        self.steps = 0

    def step(self, x: Tensor) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.setup.lr_at(self.steps)
        with self.setup.autocast():
            out = self.sae(x)
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return out.mse.detach()

    def weights(self) -> Weights:
        sae = self.sae
        return Weights.copied(sae.W_enc.t(), sae.b_enc, sae.W_dec, sae.b_dec)

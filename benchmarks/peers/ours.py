"""SampledSAE with RowAdam on row gradients, or with torch's fused Adam on dense ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.candidate import Candidate, Setup, Weights
from sampled_sae import RowAdam, SampledSAE

CLIP = 1.0


class Library(Candidate):
    def __init__(self, setup: Setup, weights: Weights, optimizer: str, rule: dict[str, Any]) -> None:
        self.setup, self.dense = setup, optimizer == "Adam"
        self.sae = weights.sae(setup.k, dead_after=setup.dead_after, row_grads=not self.dense, **rule)
        if self.dense:
            on_gpu = setup.device != "cpu"
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.sae.parameters(), lr=setup.lr, fused=True, capturable=on_gpu
            )
        else:
            self.optimizer = RowAdam(self.sae, lr=setup.lr, clip=CLIP, mode=optimizer)

    def forward_backward(self, x: Tensor) -> None:
        """A step without its optimizer."""
        self._backward(x)
        self.optimizer.zero_grad()

    def step(self, x: Tensor) -> Tensor:
        self.set_lr(self.optimizer)
        mse = self._backward(x)
        if self.dense:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), CLIP)
            self.sae.project_decoder_grad()
        self.optimizer.step()
        if self.dense:
            self.sae.normalize_decoder()
        self.optimizer.zero_grad()
        return mse

    def tensors(self) -> Weights:
        return weights_of(self.sae)

    def _backward(self, x: Tensor) -> Tensor:
        with self.setup.autocast():
            out = self.sae(x)
        out.loss.backward()
        return out.mse.detach()


def weights_of(sae: SampledSAE) -> Weights:
    """Its own tensors, but for a skip."""
    return Weights(sae.W_enc.t(), sae.b_enc, sae.W_dec, sae.b_dec)

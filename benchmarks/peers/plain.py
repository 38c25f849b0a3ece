"""Any rule as one would write it in PyTorch, eager or with its loss under torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.candidate import Candidate, Setup, Weights
from sampled_sae.bench import EagerStep, Settings


class Library(Candidate):
    """The eager step of `sampled-sae bench`: dense codes and gradients; on a CPU in float32."""

    def __init__(
        self, setup: Setup, weights: Weights, compiled: bool, l: float | None = None, select: str = "batch"
    ) -> None:
        self.setup = setup
        where = {"device": setup.device, "dtype": "float32" if setup.device == "cpu" else setup.dtype}
        settings = Settings(setup.d, setup.F, setup.B, setup.k, l, select=select, **where)
        self.eager = EagerStep(settings, weights.sae(setup.k))
        if compiled:
            self.eager.loss = torch.compile(self.eager.loss)

    def step(self, x: Tensor) -> Tensor:
        self.set_lr(self.eager.optimizer)
        loss = self.eager(x)
        self.eager.optimizer.zero_grad()
        return loss

    def tensors(self) -> Weights:
        w = self.eager.weights
        return Weights(w["W_enc"].t(), w["b_enc"], w["W_dec"], w["b_dec"])

"""A crosscoder of ours with RowAdam, which begins as a training by `Trainer` does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.candidate import Candidate, Setup, Weights
from benchmarks.peers.ours import CLIP
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig


class Library(Candidate):
    """`first` is the first batch, [B, layers * d]."""

    def __init__(self, setup: Setup, first: Tensor, optimizer: str, rule: dict[str, Any]) -> None:
        self.setup = setup
        shape = {"d_in": setup.d, "layers": setup.layers, "d_sae": setup.F, "k": setup.k, "seed": setup.seed}
        self.sae = SampledSAE(SampledSAEConfig(**shape, dead_after=setup.dead_after, row_grads=True, **rule))
        self.sae.init_b_dec(first)
        self.optimizer = RowAdam(self.sae, lr=setup.lr, clip=CLIP, mode=optimizer)

    def step(self, x: Tensor) -> Tensor:
        self.set_lr(self.optimizer)
        out = self.sae(x)
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out.mse.detach()

    def tensors(self) -> Weights:
        return Weights(self.sae.W_enc.t(), self.sae.b_enc, self.sae.W_dec, self.sae.b_dec)

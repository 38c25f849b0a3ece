"""A skip transcoder of ours with RowAdam, which begins as a training by `Trainer` does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.candidate import Candidate, Setup, TranscoderWeights
from benchmarks.peers.ours import CLIP
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig


class Library(Candidate):
    """`first` is the first batch: what is read, and its targets."""

    def __init__(self, setup: Setup, first: tuple[Tensor, Tensor], optimizer: str, rule: dict[str, Any]) -> None:
        self.setup = setup
        x, target = first
        shape = {"d_in": x.shape[1], "d_out": target.shape[1], "d_sae": setup.F, "k": setup.k, "skip": True}
        shape |= {"seed": setup.seed}
        self.sae = SampledSAE(SampledSAEConfig(**shape, dead_after=setup.dead_after, row_grads=True, **rule))
        self.sae.init_b_dec(x, target)
        self.optimizer = RowAdam(self.sae, lr=setup.lr, clip=CLIP, mode=optimizer)

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        self.set_lr(self.optimizer)
        out = self.sae(x, target)
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out.mse.detach()

    def tensors(self) -> TranscoderWeights:
        sae = self.sae
        return TranscoderWeights(sae.W_enc.t(), sae.b_enc, sae.W_dec, sae.b_dec, sae.W_skip.t())

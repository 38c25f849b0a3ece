"""A skip transcoder or a crosscoder of ours with RowAdam, which begins as a training by `Trainer` does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.candidate import Candidate, Setup, TranscoderWeights, Weights
from benchmarks.peers.ours import CLIP, weights_of
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig


class Library(Candidate):
    """`first` is the first batch: of a transcoder what is read and its targets, of a crosscoder [B, layers * d]."""

    def __init__(self, setup: Setup, first: tuple[Tensor, ...], optimizer: str, rule: dict[str, Any]) -> None:
        self.setup = setup
        shape: dict[str, Any] = {"d_in": setup.d, "layers": setup.layers}
        if len(first) == 2:
            shape = {"d_in": setup.d, "d_out": first[1].shape[1], "skip": True}
        same = {"d_sae": setup.F, "k": setup.k, "seed": setup.seed, "dead_after": setup.dead_after}
        config = SampledSAEConfig(**shape, **same, row_grads=True, **rule)
        self.sae = SampledSAE(config, device=setup.device)
        self.sae.init_b_dec(*first)
        self.optimizer = RowAdam(self.sae, lr=setup.lr, clip=CLIP, mode=optimizer)

    def step(self, *given: Tensor) -> Tensor:
        self.set_lr(self.optimizer)
        out = self.sae(*given)
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out.mse.detach()

    def tensors(self) -> Weights | TranscoderWeights:
        found = weights_of(self.sae)
        return TranscoderWeights(*found, self.sae.W_skip.t()) if self.sae.cfg.skip else found

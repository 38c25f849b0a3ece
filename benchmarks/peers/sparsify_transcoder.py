"""sparsify: a SparseCoder as a skip transcoder, begun and trained as its Trainer does it."""

from __future__ import annotations

import torch
from torch import Tensor

# through the module that keeps it from taking Triton on a CPU before it is imported
from benchmarks.peers import sparsify
from benchmarks.peers.candidate import Setup, TranscoderWeights


class Library(sparsify.Library):
    """Its decoder begins with zeros, its b_dec with the mean of the first targets; no row is normalised."""

    def __init__(self, setup: Setup, first: tuple[Tensor, Tensor], optimizer: str = "signum") -> None:
        self.setup = setup
        x, target = first
        shape = sparsify.SparseCoderConfig(num_latents=setup.F, k=setup.k, transcode=True, skip_connection=True)
        torch.manual_seed(setup.seed)
        self.sae = sparsify.SparseCoder(x.shape[1], shape, device=setup.device)
        self.sae.b_dec.data = target.mean(0)
        self.begin(optimizer)

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        variance = (target - target.mean(0)).pow(2).sum()
        out = self.forward_backward(x, target, variance)
        self.update(len(x))
        return out.fvu.detach() * variance / len(x)

    def tensors(self) -> TranscoderWeights:
        sae = self.sae
        return TranscoderWeights(sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec, sae.W_skip)

"""sparsify: a TopK SparseCoder, and around it what its Trainer does with each batch of activations."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from schedulefree import ScheduleFreeWrapper
from torch import Tensor

if not torch.cuda.is_available():
    # its own switch: where Triton is installed it would take its Triton decoder on a CPU too, which cannot run
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD

from benchmarks.peers.candidate import Candidate, Setup, Weights


class Library(Candidate):
    """With its default optimizer, schedule-free signum at its own learning rate, or Adam at the setup's.

    From weights an SAE, whose rows are of unit norm. From a first batch and its targets a skip transcoder, as its
    Trainer begins one: the decoder with zeros, b_dec with the mean of the targets, and no row is normalised. Its
    default training has neither AuxK nor Multi-TopK, and so has this.
    """

    def __init__(
        self, setup: Setup, start: Weights | tuple[Tensor, Tensor], optimizer: str = "signum", with_us: bool = False
    ) -> None:
        if with_us:
            from sampled_sae.integrations.sparsify import patch_sparsify

            patch_sparsify()
        self.setup, is_sae = setup, isinstance(start, Weights)
        torch.manual_seed(setup.seed)
        config = SparseCoderConfig(num_latents=setup.F, k=setup.k, transcode=not is_sae, skip_connection=not is_sae)
        self.sae = SparseCoder(setup.d, config, device=setup.device)
        if isinstance(start, Weights):
            self.load(start)
        else:
            self.sae.b_dec.data = start[1].mean(0)
        self.schedule_free = optimizer == "signum"
        if self.schedule_free:
            signum = SignSGD(self.sae.parameters(), lr=5e-3 / (setup.F / 2**14) ** 0.5)
            self.optimizer = ScheduleFreeWrapper(signum, momentum=0.95)
            self.optimizer.train()
        else:
            self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=setup.lr)
        self.idle = torch.zeros(setup.F, dtype=torch.int64, device=setup.device)
        self.fired = torch.zeros(setup.F, dtype=torch.bool, device=setup.device)

    def step(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        if target is None:
            self.sae.set_decoder_norm_to_unit_norm()
        wanted = x if target is None else target
        variance = (wanted - wanted.mean(0)).pow(2).sum()
        if not self.schedule_free:
            self.set_lr(self.optimizer)
        with self.setup.autocast():  # its own is for GPUs alone
            out = self.sae(x, target, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        if target is None:
            self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.idle += len(x)
        self.idle[self.fired] = 0
        self.fired.zero_()
        return out.fvu.detach() * variance / len(x)

    def loop(self, batches: Iterator[Tensor]) -> None:
        for x in batches:
            self.step(x)

    def tensors(self) -> Weights:
        sae = self.sae
        return Weights(sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec, sae.W_skip)

    def weights(self) -> Weights:
        """As the library would save them; of a schedule-free optimizer, the averaged ones that it evaluates with."""
        if not self.schedule_free:
            return super().weights()
        self.optimizer.eval()
        weights = super().weights()
        self.optimizer.train()
        return weights

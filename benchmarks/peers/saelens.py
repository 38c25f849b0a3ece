"""SAELens: a BatchTopKTrainingSAE with its defaults, driven by SAETrainer.step."""

from __future__ import annotations

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.peers.candidate import ENDLESS, Candidate, Setup, Weights


def training_sae(setup: Setup) -> BatchTopKTrainingSAE:
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=setup.d, d_sae=setup.F, k=setup.k, device=setup.device))


def trainer_config(setup: Setup, steps: int) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * setup.B,
        train_batch_size_samples=setup.B,
        lr=setup.lr,
        lr_end=setup.lr,
        lr_warm_up_steps=setup.warm_up,
        device=setup.device,
        autocast=setup.dtype == "bfloat16",
        dead_feature_window=max(1, setup.dead_after // setup.B),
    )


def load(sae: BatchTopKTrainingSAE, weights: Weights) -> None:
    with torch.no_grad():
        sae.W_enc.copy_(weights.W_enc.t())
        sae.b_enc.copy_(weights.b_enc)
        sae.W_dec.copy_(weights.W_dec)
        sae.b_dec.copy_(weights.b_dec)


def weights_of(sae: BatchTopKTrainingSAE) -> Weights:
    """Its codes are multiplied by the decoder's norms, and decoding divides them out: what folding comes to."""
    return Weights.copied(sae.W_enc.t(), sae.b_enc, sae.W_dec, sae.b_dec).folded()


class Library(Candidate):
    def __init__(self, setup: Setup, weights: Weights) -> None:
        self.sae = training_sae(setup)
        load(self.sae, weights)
        self.trainer = SAETrainer(trainer_config(setup, ENDLESS), self.sae, iter(()))

    def step(self, x: Tensor) -> Tensor:
        out = self.trainer.step(x)
        self.trainer.n_training_steps += 1
        return out.losses["mse_loss"].detach()

    def weights(self) -> Weights:
        return weights_of(self.sae)

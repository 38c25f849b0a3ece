"""dictionary_learning: BatchTopKTrainer.update, under autocast on a GPU as its trainSAE does."""

from __future__ import annotations

from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from torch import Tensor

from benchmarks.peers.candidate import ENDLESS, Candidate, Setup, Weights


def trainer_config(setup: Setup, steps: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "activation_dim": setup.d,
        "dict_size": setup.F,
        "k": setup.k,
        "layer": 0,
        "lm_name": "none",
        "lr": setup.lr,
        "warmup_steps": setup.warm_up,
        "device": setup.device,
        "seed": 0,
    }


def load(trainer: Any, weights: Weights) -> None:
    ae = trainer.ae
    with torch.no_grad():
        ae.encoder.weight.copy_(weights.W_enc)
        ae.encoder.bias.copy_(weights.b_enc)
        ae.decoder.weight.copy_(weights.W_dec.t())
        ae.b_dec.copy_(weights.b_dec)


def weights_of(trainer: Any) -> Weights:
    ae = trainer.ae
    return Weights.copied(ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.t(), ae.b_dec)


class Library(Candidate):
    """Step 0, which only sets b_dec to the batch's geometric median first, is left out."""

    def __init__(self, setup: Setup, weights: Weights) -> None:
        self.setup = setup
        self.trainer = BatchTopKTrainer(**trainer_config(setup, ENDLESS))
        self.trainer.dead_feature_threshold = setup.dead_after
        load(self.trainer, weights)
        self.steps = 1

    def step(self, x: Tensor) -> float:
        with self.setup.autocast():
            loss = self.trainer.update(self.steps, x)
        self.steps += 1
        return loss

    def weights(self) -> Weights:
        return weights_of(self.trainer)

"""dictionary_learning's crosscoder: update of its BatchTopKCrossCoderTrainer, from a checkout that has one.

Its release on the package index has none; its branches for crosscoders have. `SAMPLED_SAE_CROSSCODERS` names the folder
that holds the package `dictionary_learning` of such a branch.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.candidate import ENDLESS, Candidate, Setup, Weights

FOLDER = "SAMPLED_SAE_CROSSCODERS"


def trainer_class() -> Any:
    """BatchTopKCrossCoderTrainer.

    Raises:
        ImportError: no folder, or one of a branch without crosscoders.
    """
    sys.path[:0] = [os.environ[FOLDER]] if os.environ.get(FOLDER) else []
    try:
        return import_module("dictionary_learning.trainers.crosscoder").BatchTopKCrossCoderTrainer
    except ImportError as error:
        raise ImportError(f"not installed: {FOLDER} must name a checkout with crosscoders ({error})") from None


class Library(Candidate):
    """Its decoder norms start at 1 in each layer, as its own default; it takes nothing of the first batch."""

    def __init__(self, setup: Setup, first: tuple[Tensor, ...]) -> None:
        self.setup = setup
        size = {"activation_dim": setup.d, "dict_size": setup.F, "num_layers": setup.layers, "k": int(setup.k)}
        schedule = {"steps": ENDLESS, "lr": setup.lr, "warmup_steps": setup.warm_up}
        self.trainer = trainer_class()(
            **size, **schedule, layer=0, lm_name="none", device=setup.device, seed=setup.seed
        )
        self.trainer.dead_feature_threshold = setup.dead_after

    def step(self, x: Tensor) -> float:
        # its update works on the batch in place
        loss = self.trainer.update(self.steps, x.view(-1, self.setup.layers, self.setup.d).clone())
        self.steps += 1
        return float(loss)

    @torch.no_grad()
    def tensors(self) -> Weights:
        """With decoder norms that add up to 1, by which it selects as ours does."""
        ae = self.trainer.ae
        norms = ae.decoder.weight.norm(dim=2).sum(0)
        W_dec = (ae.decoder.weight / norms[:, None]).transpose(0, 1).flatten(1)
        W_enc = (ae.encoder.weight.flatten(0, 1) * norms).t()
        return Weights(W_enc, ae.encoder.bias * norms, W_dec, ae.decoder.bias.flatten())

"""dictionary_learning: BatchTopKTrainer.update, under autocast on a GPU as its trainSAE does."""

from __future__ import annotations

from collections.abc import Iterator

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.training import trainSAE
from torch import Tensor

from benchmarks.peers.candidate import ENDLESS, Candidate, Setup, Weights


class Library(Candidate):
    """Step 0, which only sets b_dec to the batch's geometric median first, is left out but by the loop."""

    def __init__(self, setup: Setup, weights: Weights, with_us: bool = False) -> None:
        self.setup, kind = setup, BatchTopKTrainer
        if with_us:
            from sampled_sae.integrations import dictionary_learning

            kind = dictionary_learning.BatchTopKTrainer
        size = {"activation_dim": setup.d, "dict_size": setup.F, "k": setup.k}
        schedule = {"steps": ENDLESS, "lr": setup.lr, "warmup_steps": setup.warm_up}
        self.config = {**size, **schedule, "layer": 0, "lm_name": "none", "device": setup.device, "seed": 0}
        self.trainer = kind(**self.config)
        self.trainer.dead_feature_threshold = setup.dead_after
        self.load(weights)
        self.steps = 1

    def step(self, x: Tensor) -> float:
        with self.setup.autocast():
            loss = self.trainer.update(self.steps, x)
        self.steps += 1
        return loss

    def loop(self, batches: Iterator[Tensor]) -> None:
        config = {**self.config, "trainer": lambda **config: self.trainer}
        trainSAE(batches, [config], steps=ENDLESS, device=self.setup.device)

    def tensors(self) -> Weights:
        ae = self.trainer.ae
        return Weights(ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.t(), ae.b_dec)

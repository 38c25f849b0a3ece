"""dictionary_learning: update of its BatchTopK trainer, or the Matryoshka one, on a GPU under autocast as trainSAE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.training import trainSAE
from torch import Tensor

from benchmarks.peers.candidate import ENDLESS, Candidate, Setup, Weights


class Library(Candidate):
    """Step 0, which only sets b_dec to the batch's geometric median first, is left out but by the loop."""

    def __init__(
        self, setup: Setup, weights: Weights, with_us: bool = False, groups: tuple[int, ...] | None = None
    ) -> None:
        self.setup, kind = setup, BatchTopKTrainer if groups is None else MatryoshkaBatchTopKTrainer
        if with_us:
            from sampled_sae.integrations import dictionary_learning

            kind = dictionary_learning.BatchTopKTrainer
        size = {"activation_dim": setup.d, "dict_size": setup.F, "k": setup.k}
        schedule = {"steps": ENDLESS, "lr": setup.lr, "warmup_steps": setup.warm_up}
        if groups is not None:
            size |= {"group_fractions": [(b - a) / setup.F for a, b in pairwise((0, *groups))]}
        self.config = {**size, **schedule, "layer": 0, "lm_name": "none", "device": setup.device, "seed": setup.seed}
        self.trainer = kind(**self.config)
        self.trainer.dead_feature_threshold = setup.dead_after
        # on a CPU trainSAE has no autocast of its own
        self.trainer.update = setup.autocast()(self.trainer.update)
        self.load(weights)
        self.steps = 1

    def step(self, x: Tensor) -> float:
        loss = self.trainer.update(self.steps, x)
        self.steps += 1
        return loss

    def loop(self, batches: Iterator[Tensor]) -> None:
        config = {**self.config, "trainer": lambda **config: self.trainer}
        trainSAE(batches, [config], steps=ENDLESS, device=self.setup.device)

    def tensors(self) -> Weights:
        ae = self.trainer.ae
        if hasattr(ae, "W_enc"):
            return Weights(ae.W_enc.t(), ae.b_enc, ae.W_dec, ae.b_dec)
        return Weights(ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.t(), ae.b_dec)

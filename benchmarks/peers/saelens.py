"""SAELens: its BatchTopKTrainingSAE, or with groups the Matryoshka one, with its defaults, driven by SAETrainer."""

from __future__ import annotations

from collections.abc import Iterator

from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.peers.candidate import ENDLESS, Candidate, Setup, Weights


class Library(Candidate):
    def __init__(
        self, setup: Setup, weights: Weights, with_us: bool = False, groups: tuple[int, ...] | None = None
    ) -> None:
        shape = {"d_in": setup.d, "d_sae": setup.F, "k": setup.k, "device": setup.device}
        if groups is None:
            self.sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape))
        else:
            nested = MatryoshkaBatchTopKTrainingSAEConfig(**shape, matryoshka_widths=[*groups])
            self.sae = MatryoshkaBatchTopKTrainingSAE(nested)
        self.load(weights)
        if with_us:
            from sampled_sae.integrations.saelens import accelerate

            accelerate(self.sae)
        self.config = SAETrainerConfig(
            total_training_samples=ENDLESS * setup.B,
            train_batch_size_samples=setup.B,
            lr=setup.lr,
            lr_end=setup.lr,
            lr_warm_up_steps=setup.warm_up,
            device=setup.device,
            autocast=setup.dtype == "bfloat16",
            dead_feature_window=max(1, setup.dead_after // setup.B),
        )
        self.trainer = SAETrainer(self.config, self.sae, iter(()))

    def step(self, x: Tensor) -> Tensor:
        out = self.trainer.step(x)
        self.trainer.n_training_steps += 1
        return out.losses["mse_loss"].detach()

    def loop(self, batches: Iterator[Tensor]) -> None:
        SAETrainer(self.config, self.sae, batches).fit()

    def tensors(self) -> Weights:
        return Weights(self.sae.W_enc.t(), self.sae.b_enc, self.sae.W_dec, self.sae.b_dec)

    def weights(self) -> Weights:
        """Its codes are multiplied by the decoder's norms, and decoding divides them out: what folding comes to."""
        return super().weights().folded()

"""One run on real activations: trained, calibrated, and measured on held-out tokens under every inference."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.quality import splice_of
from benchmarks.study_parts.rows import Row
from benchmarks.study_parts.variants import Variant
from sampled_sae import SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.sweep import evaluate

BATCH = 1024


class RealStudy:
    """The runs on one store of activations.

    Args:
        store: with a held-out part. features, k: of every SAE. tokens, lr: of a training, and its peak learning rate.
        model: in which loss recovered is measured on `rows` held-out rows; None for no such measure.
    """

    def __init__(
        self, store: ActivationStore, features: int, k: float, tokens: int, lr: float, model: str | None, rows: int = 16
    ) -> None:
        self.store, self.features, self.k, self.tokens, self.lr = store, features, k, tokens, lr
        self.splice = None if model is None else splice_of(model, store, rows)
        self.held_out, _ = store.holdout()

    def run(self, variant: Variant, seed: int) -> Row:
        """Trains and measures."""
        dead_after = max(BATCH, self.tokens // 20)
        config = SampledSAEConfig(
            self.store.d_in, self.features, self.k, seed=seed, dead_after=dead_after, **variant.rule
        )
        train = TrainConfig(self.tokens // BATCH, BATCH, lr=self.lr, seed=seed)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            sae = Trainer(config, train, self.store, Path(folder)).run(progress=False)
            seconds = round(time.perf_counter() - start, 1)
            found = evaluate(sae, self.held_out, BATCH, self.splice)
        about = {"name": variant.name, "seed": seed, "tokens": self.tokens, "lr": self.lr, "batch_size": BATCH}
        rule = {name: getattr(config, name) for name in ("d_sae", "k", "l", "score", "pool", "select")}
        measures = {name: value for name, value in found.items() if not isinstance(value, (list, dict))}
        return {**about, **rule, "seconds": seconds, **measures, "tokens": self.tokens}

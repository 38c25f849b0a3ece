"""One run on known features: trained, calibrated, and held against the truth under every inference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ground_truth import metrics
from benchmarks.ground_truth.absorption import Absorption
from benchmarks.ground_truth.synthetic import Synthetic
from benchmarks.study_parts.rows import Row
from benchmarks.study_parts.training import train_ours, train_saelens
from benchmarks.study_parts.variants import SAELENS, Variant
from sampled_sae import SampledSAE, SampledSAEConfig, TrainConfig
from sampled_sae.impl.start import geometric_median
from sampled_sae.training.batches import ShuffledStream

BATCH = 1024
DATA_SEED = 0
# tokens that are made once and kept on disk; more are made for each run
MOST_STORED = 5_000_000


class SyntheticStudy:
    """The runs on one world: their data, and one row for each.

    Args:
        name: of the world. folder: for the activations. tokens, lr: of a training, and its peak learning rate.
    """

    def __init__(self, name: str, folder: Path, tokens: int, lr: float, device: str = "cpu") -> None:
        self.synthetic = Synthetic(name, device)
        self.world = self.synthetic.world
        self.folder, self.tokens, self.lr, self.device = folder / name, tokens, lr, device
        # in batches as large as those of training
        self.held_out = self.synthetic.evaluation(BATCH)
        self.calibration = self.synthetic.calibration()
        # activations times this have a mean square of 1
        self.scale = 1 / float(self.calibration.square().mean().sqrt())
        self.median = geometric_median(self.calibration[:4096] * self.scale)

    def config(self, variant: Variant, seed: int) -> SampledSAEConfig:
        w = self.world
        dead_after = max(BATCH, self.tokens // 20)
        rule = variant.rule_of(w.F)
        return SampledSAEConfig(w.d, w.F, w.k, seed=seed, dead_after=dead_after, input_scale=self.scale, **rule)

    def batches(self, seed: int) -> Iterator[Tensor]:
        """x [B, d] times the scale: an order of the stored tokens for each seed, or tokens made for it alone."""
        steps = self.tokens // BATCH
        if self.tokens <= MOST_STORED:
            store = self.synthetic.store(self.folder / f"activations_{self.tokens}", self.tokens, DATA_SEED)
            stream = ShuffledStream(store, BATCH, seed)
            factor = self.scale / store.scale
            return (stream.batch(step).to(self.device) * factor for step in range(steps))
        made = self.synthetic.batches(steps * BATCH, seed + 1)
        return (x * self.scale for batch in made for x in batch.x.split(BATCH))

    def run(self, variant: Variant, seed: int) -> Row:
        """Trains and measures."""
        config = self.config(variant, seed)
        train = TrainConfig(self.tokens // BATCH, BATCH, lr=self.lr, seed=seed)
        start = time.perf_counter()
        fit = train_saelens if variant.name == SAELENS else train_ours
        sae = fit(config, train, self.batches(seed), self.median)
        seconds = round(time.perf_counter() - start, 1)
        about = {"name": variant.name, "seed": seed, "tokens": self.tokens, "lr": self.lr, "batch_size": BATCH}
        rule = {name: getattr(config, name) for name in ("l", "score", "pool", "select")}
        return {**about, **rule, "seconds": seconds, **self.measure(sae)}

    def measure(self, sae: SampledSAE) -> Row:
        """The metrics of the decoder, and by inference those of the codes, as `threshold_f1` and so on."""
        row, matches = metrics.of_decoder(sae.W_dec, self.synthetic.truth)
        x, found = self.calibration.to(sae.W_enc), dict(row)
        if sae.cfg.is_topk:
            return found | self._codes("token", sae, matches)
        sae.cfg = replace(sae.cfg, inference="threshold")
        sae.calibrate(x)
        found |= self._codes("threshold", sae, matches)
        for mode, size in (("pool", sae.cfg.pool_size), ("chosen", self.best_size(sae, x))):
            sae.cfg = replace(sae.cfg, inference="pool", inference_pool=size)
            sae.calibrate(x)
            found |= {f"{mode}_features": size, **self._codes(mode, sae, matches)}
        sae.cfg = replace(sae.cfg, inference="batch")
        return found | self._codes("batch", sae, matches)

    def best_size(self, sae: SampledSAE, x: Tensor) -> int:
        """Of the pool's size, twice that, and so on up to all features: the set that explains most of x."""
        sizes = [sae.cfg.pool_size]
        while sizes[-1] < sae.cfg.d_sae:
            sizes.append(min(2 * sizes[-1], sae.cfg.d_sae))
        explained = {}
        for size in sizes:
            sae.cfg = replace(sae.cfg, inference="pool", inference_pool=size)
            sae.calibrate(x)
            seen = metrics.Explained()
            with torch.no_grad():
                seen.add(x, sae(x).x_hat)
            explained[size] = seen.result()
        return max(explained, key=lambda size: explained[size])

    def _codes(self, mode: str, sae: SampledSAE, matches: Tensor) -> Row:
        absorption = None
        if mode in ("threshold", "token"):
            cosine = metrics.cosines(sae.W_dec, self.synthetic.truth).cpu()
            absorption = Absorption(self.synthetic.children, matches, cosine)
        found = metrics.of_codes(sae.eval(), self.held_out, matches, absorption=absorption)
        return {f"{mode}_{name}": value for name, value in found.items()}

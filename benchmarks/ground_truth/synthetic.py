"""Activations with known features, made by sae_lens.synthetic: SynthSAEBench-16k, and one that two cores can train on.

The parameters of "16k" are those that SAELens publishes for SynthSAEBench-16k (its documentation and the script that
made it); "scaled" and "tiny" keep its shape with fewer features and dimensions. sae-lens makes them offline, from a
seed; it is in the environment of the peers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ground_truth.absorption import children_of
from benchmarks.ground_truth.metrics import Batch
from sampled_sae.training.activation_store import ActivationStore

CHUNK = 4096  # tokens that are made at once
# seeds of what is never trained on
EVALUATION, CALIBRATION = 2**31 - 1, 2**31 - 2


@dataclass(frozen=True)
class World:
    """Which true features there are, and what is trained on them.

    Attributes:
        n, d: true features, dimensions. roots: trees of 85 features each in the hierarchy.
        F, k: features of an SAE and its L0. tokens, lr: it is trained on, and its peak learning rate.
        evaluated, calibrated: tokens for measures and for thresholds.
    """

    n: int
    d: int
    roots: int
    F: int
    k: int
    tokens: int
    lr: float
    evaluated: int
    calibrated: int = 16_384


WORLDS = {
    "16k": World(16_384, 768, 128, F=4096, k=25, tokens=200_000_000, lr=3e-4, evaluated=100_000),
    "scaled": World(2048, 192, 16, F=512, k=12, tokens=1_000_000, lr=3e-3, evaluated=32_768),
    "tiny": World(256, 48, 2, F=64, k=6, tokens=8192, lr=3e-3, evaluated=2048, calibrated=2048),
}


class Synthetic:
    """The model of a world; its samples depend on the seed that is given and on nothing before."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        from sae_lens.synthetic import SyntheticModel

        self.world = WORLDS[name]
        self.model = SyntheticModel(config(self.world), device=device)

    @property
    def truth(self) -> Tensor:
        """The true features, [N, d]."""
        return self.model.feature_dict.feature_vectors.detach()

    @property
    def children(self) -> dict[int, list[int]]:
        """parent -> its children in the hierarchy, numbers of true features."""
        return children_of(self.model.hierarchy.roots)

    def batches(self, tokens: int, seed: int) -> Iterator[Batch]:
        """So many tokens, in chunks, on the model's device; the same for the same seed there."""
        for i, start in enumerate(range(0, tokens, CHUNK)):
            with seeded(seed * 1_000_003 + i):
                x, features = self.model.sample_with_features(min(CHUNK, tokens - start))
            yield Batch(x.detach(), features > 0)

    def evaluation(self, batch_size: int) -> list[Batch]:
        """What all SAEs are measured on, on the CPU."""
        made = self.batches(self.world.evaluated, EVALUATION)
        return [Batch(*parts) for batch in made for parts in zip(*(t.cpu().split(batch_size) for t in batch))]

    def calibration(self) -> Tensor:
        """[n, d]."""
        return torch.cat([batch.x for batch in self.batches(self.world.calibrated, CALIBRATION)])

    def store(self, folder: Path, tokens: int, seed: int) -> ActivationStore:
        """Training tokens on disk; made where they are not there yet."""
        if (folder / "manifest.json").exists():
            return ActivationStore.open(folder)
        x = (batch.x.cpu() for batch in self.batches(tokens, seed))
        return ActivationStore.write(folder, x, source=f"synthetic, seed {seed}")


def config(world: World) -> Any:
    """sae-lens' config of a world."""
    from sae_lens import synthetic as s

    return s.SyntheticModelConfig(
        num_features=world.n,
        hidden_dim=world.d,
        firing_probability=s.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=s.HierarchyConfig(
            total_root_nodes=world.roots,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=s.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=s.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=s.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=s.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=42,
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generators start from the seed inside, and are as they were behind."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield

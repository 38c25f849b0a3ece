"""A library's own training loop, on real activations where there are any of its width, and what it has learned."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from benchmarks.steps.session import StepSession
from sampled_sae.bench import activations
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.feed import Feed


class LoopSession(StepSession):
    """folder: of the activations. steps: after which it is judged on real ones, in all; on drawn ones at once."""

    def __init__(self, *of_step: Any, folder: Path | None = None, steps: int = 0) -> None:
        super().__init__(*of_step)
        setup = self.setup
        store = None if folder is None else ActivationStore.open(folder)
        self.last, self.drawn = steps, store is None or store.d_in != setup.d
        if store is None or self.drawn:
            self.batches = (activations(setup.B, setup.d, t) for t in itertools.count())
            self.held_out = activations(setup.B, setup.d, 10**6)
        else:
            feed = Feed(store, setup.B, seed=0)
            self.batches = (feed.batch(t).x for t in itertools.count())
            self.held_out = store.holdout()[0][: setup.B] * store.scale

    def first_error(self) -> float:
        """The FVU after one step: a loop does not tell the error of a step."""
        self.step()
        return self.fvu()

    def afterwards(self) -> dict[str, Any]:
        """The FVU after the last step, which it goes on to."""
        while self.candidate.steps < self.last and not self.drawn:
            self.step()
        return {"fvu": self.fvu(), "steps": self.candidate.steps, "activations": "drawn" if self.drawn else "real"}

    @torch.no_grad()
    def fvu(self) -> float:
        """Of held-out activations by the training rule, from the weights alone, the same with us and without."""
        x = self.held_out
        mse = self.candidate.weights().sae(self.setup.k, **self.entry.rule)(x).mse
        return float(mse / (x - x.mean(0)).square().sum(1).mean())

"""What `equal_time.py` trains: SAEs, Matryoshka SAEs, skip transcoders and crosscoders; and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measure import Row, product, spread_columns
from benchmarks.peers import AUTOCAST, BATCH, CANDIDATES, TOKEN, Entry, Setup, Weights, make, ours
from benchmarks.peers.candidate import initial_weights
from benchmarks.workloads import three_groups
from sampled_sae import SampledSAE
from sampled_sae.lm import LayersSplice, PointSplice, SpliceEvaluator
from sampled_sae.support.timing import timed
from sampled_sae.training.activations import Activations
from sampled_sae.training.feed import Feed, TrainingBatch
from sampled_sae.training.opening import as_activations

PRODUCT_EVERY = 5


@dataclass(frozen=True)
class Kind:
    """What is trained.

    Attributes:
        entries: the candidates, for a dictionary of F features.
        start: (setup, first batch) to what a candidate is made with.
        splice: its evaluator in the language model.
        rule: of the SampledSAEConfig of the SAE that is judged, beside k and the scale of its input.
    """

    entries: Callable[[int], dict[str, Entry]]
    start: Callable[[Setup, TrainingBatch], Any]
    splice: Any
    rule: Callable[[Setup, Activations], dict[str, Any]]


# those that say no more than the others
LEFT_OUT = ("ours, l=1", "ours, l=16", "eager PyTorch BatchTopK", "torch.compile BatchTopK")
SAES = {name: entry for name, entry in (CANDIDATES | AUTOCAST).items() if name not in LEFT_OUT}
RULES: dict[str, dict[str, Any]] = {"l=4": {"l": 4.0}, "l=None (BatchTopK)": BATCH}
SAES["ours, l=4, decayed, pool_every=4"] = ours("decayed", l=4.0, pool_every=4)


def matryoshka(F: int) -> dict[str, Entry]:
    nested: dict[str, Any] = {"groups": three_groups(F)}
    return {
        "ours, l=4": ours(l=4.0, **nested),
        "ours, l=None (BatchTopK)": ours(**BATCH, **nested),
        "SAELens MatryoshkaBatchTopK": Entry("saelens", BATCH, nested, "sae-lens"),
        "dictionary_learning MatryoshkaBatchTopK": Entry("dictionary_learning", BATCH, nested, "dictionary-learning"),
    }


def transcoders(F: int) -> dict[str, Entry]:
    peer = {"sparsify TopK": {"optimizer": "signum"}, "sparsify TopK, Adam": {"optimizer": "adam"}}
    found = {f"ours, {name}": ours(**rule) for name, rule in {**RULES, "TopK": TOKEN}.items()}
    return found | {name: Entry("sparsify", TOKEN, how, "eai-sparsify") for name, how in peer.items()}


def crosscoders(F: int) -> dict[str, Entry]:
    found = {f"ours, {name}": ours(**rule) for name, rule in RULES.items()}
    return found | {"dictionary_learning BatchTopKCrossCoder": Entry("dictionary_learning_crosscoder", BATCH)}


def from_weights(setup: Setup, batch: TrainingBatch) -> Weights:
    return initial_weights(setup, batch.median)


def from_batch(setup: Setup, batch: TrainingBatch) -> tuple[Tensor, ...]:
    """What a step is given."""
    return (batch.x,) if batch.target is None else (batch.x, batch.target)


KINDS = {
    "sae": Kind(lambda F: SAES, from_weights, SpliceEvaluator, lambda setup, store: {}),
    "matryoshka": Kind(
        matryoshka, from_weights, SpliceEvaluator, lambda setup, store: {"groups": three_groups(setup.F)}
    ),
    "crosscoder": Kind(crosscoders, from_batch, LayersSplice, lambda setup, store: {"layers": setup.layers}),
    "transcoder": Kind(transcoders, from_batch, PointSplice, lambda setup, store: {"output_scale": store.output_scale}),
}


@dataclass(frozen=True)
class Task:
    """What all candidates of a kind train on, and how.

    Attributes:
        kind, activations, setup: of `KINDS`, the folder of what is trained on, and sizes.
        steps, marks: after how many steps, 0 for none, and after how many seconds of them, weights are kept.
        folder: where.
        threads: of each candidate.
        names: the candidates; all of the kind for None.
    """

    kind: str
    activations: Path
    setup: Setup
    steps: int
    marks: tuple[float, ...]
    folder: Path
    threads: int
    names: list[str] | None = None

    @property
    def entries(self) -> dict[str, Entry]:
        found = KINDS[self.kind].entries(self.setup.F)
        return found if self.names is None else {name: entry for name, entry in found.items() if name in self.names}


def sae_of(task: Task, tensors: dict[str, Tensor], store: Activations) -> SampledSAE:
    """The SAE of weights that a `TrainingSession` has saved."""
    rule = KINDS[task.kind].rule(task.setup, store)
    return Weights(**tensors).sae(task.setup.k, l=None, input_scale=store.scale, **rule)


class TrainingSession:
    """One candidate in training. Where there are marks on the way to the last step, the encoder product is timed beside
    some of the steps."""

    def __init__(self, task: Task, name: str) -> None:
        torch.set_num_threads(task.threads)
        self.task, self.name = task, f"{task.kind}, {name}, seed {task.setup.seed}"
        self.device = task.setup.device
        self.feed = Feed(as_activations(task.activations), task.setup.B, task.setup.seed, self.device)
        first = self.feed.batch(0)
        self.candidate = make(task.entries[name], task.setup, KINDS[task.kind].start(task.setup, first))
        self.product = product(first.x, torch.randn(task.setup.F, first.x.shape[1], device=self.device))
        self.seconds, self.steps = 0.0, 0
        self.ratios: list[float] = []

    def train(self, until: float) -> None:
        """Goes on until the steps have taken `until` seconds in all."""
        while self.seconds < until:
            self._step()

    def finish(self) -> None:
        """Goes on to the last of the steps."""
        while self.steps < self.task.steps:
            self._step()

    def save(self, mark: str) -> Row:
        """The weights as they are, in a file; what its row has of it."""
        file = f"{self.name}, {mark}.safetensors"
        save_file(self.candidate.weights().tensors(), self.task.folder / file)
        return {"at": mark, "steps": self.steps, "seconds": self.seconds, "weights": file}

    def after_steps(self) -> Row:
        """What `save` gave after the last of the steps, and the figures of a step where they were taken."""
        return {**self.at_steps, **(spread_columns(self.ratios, "ratio") if self.ratios else {})}

    def _step(self) -> None:
        given = from_batch(self.task.setup, self.feed.batch(self.steps))
        beside = self.task.steps and self.task.marks and self.steps % PRODUCT_EVERY == PRODUCT_EVERY - 1
        floor = min(timed(self.product, self.device) for _ in range(2)) if beside else 0.0
        taken = timed(lambda: self.candidate.step(*given), self.device)
        self.ratios += [taken / floor] if beside else []
        self.seconds += taken
        self.steps += 1
        if self.steps == self.task.steps:
            self.at_steps = self.save(f"{self.steps} steps")

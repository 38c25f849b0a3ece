"""One training step of each library as that library does it, of plain PyTorch, and of ours, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from benchmarks.measure import version
from benchmarks.peers.candidate import Candidate, Setup, Weights, initial_weights

__all__ = [
    "CANDIDATES",
    "DISTRIBUTIONS",
    "Candidate",
    "Entry",
    "Setup",
    "Weights",
    "initial_weights",
    "installed",
    "make",
    "ours",
]

BATCH: dict[str, Any] = {"l": None}
TOKEN: dict[str, Any] = {"l": None, "select": "token"}


@dataclass(frozen=True)
class Entry:
    """Where a candidate is defined, what it needs, and by which rule it chooses its codes.

    Attributes:
        module, options: module of this package, and what its `Library` class is made with.
        rule: of the SampledSAEConfig that computes the same codes.
        distribution: the package that has to be installed; None for none.
    """

    module: str
    rule: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    distribution: str | None = None


def ours(mode: str = "dense", **rule: Any) -> Entry:
    codes = {name: rule[name] for name in ("l", "select") if name in rule}
    return Entry("ours", codes, {"mode": mode, "rule": rule})


CANDIDATES = {
    "ours, l=1": ours(l=1.0),
    "ours, l=4": ours(l=4.0),
    "ours, l=16": ours(l=16.0),
    "ours, l=None (BatchTopK)": ours(**BATCH),
    "ours, TopK": ours(**TOKEN),
    "SAELens BatchTopK": Entry("saelens", BATCH, {}, "sae-lens"),
    "dictionary_learning BatchTopK": Entry("dictionary_learning", BATCH, {}, "dictionary-learning"),
    "overcomplete BatchTopK": Entry("overcomplete", BATCH, {}, "overcomplete"),
    "sparsify TopK": Entry("sparsify", TOKEN, {"optimizer": "signum"}, "eai-sparsify"),
    "sparsify TopK, Adam": Entry("sparsify", TOKEN, {"optimizer": "adam"}, "eai-sparsify"),
    "eager PyTorch BatchTopK": Entry("plain", BATCH, {"compiled": False}),
    "torch.compile BatchTopK": Entry("plain", BATCH, {"compiled": True}),
}
DISTRIBUTIONS = ("sae-lens", "dictionary-learning", "overcomplete", "eai-sparsify")


def installed(candidate: str | Entry) -> bool:
    """Whether the library behind a candidate is there."""
    distribution = entry_of(candidate).distribution
    return distribution is None or version(distribution) is not None


def make(candidate: str | Entry, setup: Setup, weights: Weights) -> Candidate:
    """One of CANDIDATES by its name, or another entry, with these initial weights; imports its library."""
    entry = entry_of(candidate)
    return import_module(f"{__name__}.{entry.module}").Library(setup, weights, **entry.options)


def entry_of(candidate: str | Entry) -> Entry:
    return CANDIDATES[candidate] if isinstance(candidate, str) else candidate

"""One training step of each library as that library does it, of plain PyTorch, and of ours, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.measure import version
from benchmarks.peers.candidate import Candidate, Setup, Weights

BATCH: dict[str, Any] = {"l": None}
TOKEN: dict[str, Any] = {"l": None, "select": "token"}


@dataclass(frozen=True)
class Entry:
    """Where a candidate is defined, what it needs, and by which rule it chooses its codes.

    Attributes:
        module, options: module of this package, and what its `Library` class is made with.
        rule: of the SampledSAEConfig that computes the same codes.
        distribution: the package that has to be installed; None for none.
        steps: steps in one sample, whose mean is taken.
        beside: another candidate, of whose time this one's is given as a multiple too.
        tree: folder with another revision of this repository, which its process imports.
        graph: the step is captured as a CUDA graph.
        dtype: of its products, where not that of the setup.
    """

    module: str
    rule: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    distribution: str | None = None
    steps: int = 1
    beside: str | None = None
    tree: Path | None = None
    graph: bool = False
    dtype: str | None = None

    def of(self, setup: Setup) -> Setup:
        """The setup with the dtype of its products."""
        return setup if self.dtype is None else replace(setup, dtype=self.dtype)


def ours(optimizer: str = "dense", **rule: Any) -> Entry:
    """Our step: RowAdam in this mode, or "Adam"."""
    codes = {name: rule[name] for name in ("l", "select", "score_tokens") if name in rule}
    return Entry("ours", codes, {"optimizer": optimizer, "rule": rule}, steps=rule.get("pool_every", 1))


def plain(compiled: bool = False, **rule: Any) -> Entry:
    """Plain PyTorch under the same rule."""
    return Entry("plain", rule, {"compiled": compiled, **rule})


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
    "eager PyTorch BatchTopK": plain(**BATCH),
    "torch.compile BatchTopK": plain(compiled=True, **BATCH),
}
# of a name
UNDER_AUTOCAST = ", bf16 autocast"
# the peers again, their products in bfloat16: faster, and no longer what their rule says
AUTOCAST = {
    f"{name}{UNDER_AUTOCAST}": replace(entry, dtype="bfloat16")
    for name, entry in CANDIDATES.items()
    if entry.distribution is not None
}


def installed(entry: Entry) -> bool:
    """Whether the library behind a candidate is there."""
    return entry.distribution is None or version(entry.distribution) is not None


def make(entry: Entry, setup: Setup, weights: Weights) -> Candidate:
    """With these initial weights; imports its library."""
    return import_module(f"{__name__}.{entry.module}").Library(entry.of(setup), weights, **entry.options)

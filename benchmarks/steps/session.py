"""One candidate in training at one size, beside the encoder product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sampled_sae
from benchmarks.measure import product, product_in_chunks
from benchmarks.peers import Entry, Setup, make
from benchmarks.peers.candidate import initial_weights
from sampled_sae.bench import activations, peak_of
from sampled_sae.support.timing import timed

# several: a threshold guessed from the last batch is as good as in training, not perfect
BATCHES = 4
GRAPH_WARM_UP = 3


class Size:
    """What all candidates of one size are given: weights, batches, and the products beside which they are timed."""

    def __init__(self, setup: Setup) -> None:
        self.k, self.weights = setup.k, initial_weights(setup)
        self.batches = [activations(setup.B, setup.d, seed).to(setup.device) for seed in range(BATCHES)]
        self._errors: dict[str, float] = {}
        dtype = getattr(torch, setup.dtype)
        x, W = self.batches[0].to(dtype), self.weights.W_enc.to(dtype)
        self.products: dict[str, Callable[[], Callable[[], Any]]] = {
            "product": lambda: product(x, W),
            "chunks": lambda: product_in_chunks(x, W),
            "allocating": lambda: lambda: torch.mm(x, W.t()),
        }

    @torch.no_grad()
    def expected_error(self, rule: dict[str, Any]) -> float:
        """What the reference implementation says of the first batch by this rule."""
        if str(rule) not in self._errors:
            self._errors[str(rule)] = float(self.weights.sae(self.k, impl="reference", **rule)(self.batches[0]).mse)
        return self._errors[str(rule)]


size_of = lru_cache(maxsize=1)(Size)


class StepSession:
    """Candidate and products; `calls` names what is timed before each step: products, or "without_optimizer"."""

    def __init__(self, entry: Entry, setup: Setup, threads: int, calls: tuple[str, ...]) -> None:
        torch.set_num_threads(threads)
        imported = Path(sampled_sae.__file__).resolve()
        if entry.tree is not None and not imported.is_relative_to(entry.tree.resolve()):
            raise RuntimeError(f"sampled_sae was imported from {imported}, not from the revision that is to be timed")
        self.entry, self.setup = entry, setup
        self.size = size = size_of(setup)
        self.batches: Iterator[Tensor] = itertools.cycle(size.batches)
        self.candidate = make(entry, setup, size.weights)
        self.step: Callable[[], Any] = lambda: self.candidate.step(next(self.batches))
        self.calls = {name: size.products[name]() for name in calls if name in size.products}
        if "without_optimizer" in calls and hasattr(self.candidate, "forward_backward"):
            self.calls["without_optimizer"] = lambda: self.candidate.forward_backward(next(self.batches))

    def first_error(self) -> float:
        """Of batch 0 and the initial weights, by a whole step."""
        error = float(self.step())
        if self.entry.graph:
            self.step = self._captured()
        return error

    def expected_error(self) -> float:
        """That of the reference implementation by the candidate's rule."""
        return self.size.expected_error(self.entry.rule)

    def sample(self) -> dict[str, float]:
        """Seconds of each of the calls, and of a step after them."""
        self.calls["product"]()  # wakes threads and caches after the other processes' turns
        seconds = {name: timed(call, self.setup.device) for name, call in self.calls.items()}
        steps = [timed(self.step, self.setup.device) for _ in range(self.entry.steps)]
        return {**seconds, "step": sum(steps) / len(steps)}

    def afterwards(self) -> dict[str, Any]:
        """Shares of the columns and entries that the last step's screen left open; empty where there was none."""
        sae = getattr(self.candidate, "sae", None)
        # an older revision has no such attribute, a library's SAE no such memory
        looks = getattr(getattr(sae, "memory", None), "looks", None)
        return {} if looks is None else {f"undecided_{name}": share for name, share in looks.shares().items()}

    def peak_bytes(self) -> int | None:
        """Of two steps or more, above what is held between steps.

        None for a graph, which holds all of it, and where the system does not tell.
        """
        if self.entry.graph:
            return None
        count = range(max(2, self.entry.steps))
        return peak_of(lambda: [self.step() for _ in count], self.setup.device)

    def _captured(self) -> Callable[[], Any]:
        """One step on the next batch, which is copied to where the graph reads it; what came before is its warm-up."""
        from sampled_sae.support.cuda_graphs import CudaGraphs  # older revisions have none

        x, graphs = next(self.batches).clone(), CudaGraphs(torch.device(self.setup.device))
        graphs.warm(lambda: [self.candidate.step(x.copy_(next(self.batches))) for _ in range(GRAPH_WARM_UP)])
        graph = graphs.capture(lambda: self.candidate.step(x))
        return lambda: (x.copy_(next(self.batches)), graph.replay())

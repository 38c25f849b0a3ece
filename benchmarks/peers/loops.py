"""A peer's own training loop, alone or with us; it gets a batch from an iterator when it is to take a step."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from queue import SimpleQueue
from threading import Thread

import torch
from torch import Tensor

from benchmarks.peers.candidate import Candidate, Setup, Weights


class Library(Candidate):
    """The loop runs in a thread; a step's error is not known.

    Autocast is each library's own, entered anew in each step: one around the whole loop would go on with the rounded
    weights that it keeps until it is left.
    """

    def __init__(self, setup: Setup, weights: Weights, library: str, with_us: bool) -> None:
        torch.manual_seed(0)
        self.setup = setup
        self.batches: SimpleQueue[Tensor] = SimpleQueue()
        self.answers: SimpleQueue[Exception | None] = SimpleQueue()
        self.library = import_module(f"benchmarks.peers.{library}").Library(setup, weights, with_us=with_us)
        Thread(target=self._run, daemon=True).start()

    def step(self, x: Tensor) -> float:
        self.steps += 1
        self.batches.put(x)
        answer = self.answers.get()
        if answer is not None:
            raise answer
        return float("nan")

    def tensors(self) -> Weights:
        return self.library.tensors()

    def weights(self) -> Weights:
        return self.library.weights()

    def _run(self) -> None:
        try:
            self.library.loop(self._batches())
            raise RuntimeError("the loop ended")
        except Exception as error:
            self.answers.put(error)

    def _batches(self) -> Iterator[Tensor]:
        while True:
            yield self.batches.get()
            # the loop asks for the next batch: the step is over
            self.answers.put(None)

"""The peers' own training loops, alone or with us: SAELens' SAETrainer.fit, dictionary_learning's trainSAE, and
sparsify's SparseCoder with its default optimizer. Each gets a batch from an iterator when it is to take a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.candidate import ENDLESS, Candidate, Setup, Weights

Loop = tuple[Callable[[Iterator[Tensor]], Any], Callable[[], Weights]]


def saelens(setup: Setup, weights: Weights, with_us: bool) -> Loop:
    from sae_lens.training.sae_trainer import SAETrainer

    from benchmarks.peers.saelens import trainer_config, training_sae, weights_of

    sae = training_sae(setup)
    if with_us:
        from sampled_sae.integrations.saelens import accelerate

        accelerate(sae)
    config = trainer_config(setup, ENDLESS)
    return lambda batches: SAETrainer(config, sae, batches).fit(), lambda: weights_of(sae)


def dictionary_learning(setup: Setup, weights: Weights, with_us: bool) -> Loop:
    from dictionary_learning.training import trainSAE

    from benchmarks.peers.dictionary_learning import trainer_config, weights_of

    if with_us:
        from sampled_sae.integrations.dictionary_learning import BatchTopKTrainer
    else:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    made: list[Any] = []

    def remembered(**config: Any) -> Any:
        made.append(BatchTopKTrainer(**config))
        return made[0]

    config = {"trainer": remembered, **trainer_config(setup, ENDLESS)}
    loop = lambda batches: trainSAE(batches, [config], steps=ENDLESS, device=setup.device)  # noqa: E731
    return loop, lambda: weights_of(made[0])


def sparsify(setup: Setup, weights: Weights, with_us: bool) -> Loop:
    from benchmarks.peers.sparsify import Library as Sparsify

    if with_us:
        from sampled_sae.integrations.sparsify import patch_sparsify

        patch_sparsify()
    library = Sparsify(setup, weights, optimizer="signum")
    return lambda batches: [library.step(x) for x in batches], library.weights


LOOPS = {"saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}


class Library(Candidate):
    """The loop runs in a thread; a step's error is not known."""

    def __init__(self, setup: Setup, weights: Weights, loop: str, with_us: bool) -> None:
        torch.manual_seed(0)
        self.batches: SimpleQueue[Tensor] = SimpleQueue()
        self.answers: SimpleQueue[Exception | None] = SimpleQueue()
        self.loop, self.trained = LOOPS[loop](setup, weights, with_us)
        Thread(target=self._run, daemon=True).start()

    def step(self, x: Tensor) -> float:
        self.batches.put(x)
        answer = self.answers.get()
        if answer is not None:
            raise answer
        return float("nan")

    def weights(self) -> Weights:
        return self.trained()

    def _run(self) -> None:
        try:
            self.loop(self._batches())
            raise RuntimeError("the loop ended")
        except Exception as error:
            self.answers.put(error)

    def _batches(self) -> Iterator[Tensor]:
        while True:
            yield self.batches.get()
            # the loop asks for the next batch: the step is over
            self.answers.put(None)

"""One training step of each library that is installed, of plain PyTorch and of ours (benchmarks/peers).

As benchmarks/peer_steps.py, but in one process, for the time that starting others takes. A candidate whose error on the
first batch is not that of the reference implementation under the same rule gets no figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.peer_steps import TOLERANCE

from benchmarks.gpu_parts.visit import Row, Visit, batches, operands
from benchmarks.measure import product
from benchmarks.peers import CANDIDATES, Setup, Weights, initial_weights, installed, make
from benchmarks.workloads import Workload, activations
from sampled_sae import SampledSAE, SampledSAEConfig
from sampled_sae.support.timing import Call, interleaved, peak_memory, spread

# for a candidate, and for one that has to be compiled first; at most for the rounds of one
LEAST_SECONDS, LEAST_TO_COMPILE, SECONDS = 2, 15, 2


@dataclass
class Case:
    """What all candidates are given, and what their error on the first batch has to be."""

    w: Workload
    setup: Setup
    weights: Weights
    first: torch.Tensor
    batches: Iterator[torch.Tensor]
    floor: Call
    _errors: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def error(self, rule: dict[str, Any]) -> float:
        """Of the first batch, by the reference implementation."""
        if str(rule) not in self._errors:
            cfg = SampledSAEConfig(d_in=self.w.d, d_sae=self.w.F, k=self.w.k, impl="reference", **rule)
            sae = self.weights.copy_to(SampledSAE(cfg, device=self.setup.device))
            self._errors[str(rule)] = float(sae(self.first).mse)
        return self._errors[str(rule)]


def run(visit: Visit) -> None:
    w = visit.workloads[0] if visit.rehearse else visit.workloads[1]
    setup = Setup(w.B, w.d, w.F, w.k, device=visit.device)
    first = activations(w, 0).to(visit.device)
    floor = product(*operands(w, visit.device, torch.float32 if visit.rehearse else torch.bfloat16))
    case = Case(w, setup, initial_weights(setup), first, batches(w, visit.device), floor)
    compiled = [name for name in CANDIDATES if "torch.compile" in name]
    # last, because nothing ends a compilation that takes too long
    for name in [*(name for name in CANDIDATES if name not in compiled), *compiled]:
        row = {"name": name, **w.columns()}
        if not installed(name):
            visit.add({**row, "note": "not installed"})
        elif visit.rehearse and name in compiled:
            visit.add({**row, "note": "left out: the compiler takes longer than the rehearsal"})
        else:
            least = LEAST_TO_COMPILE if name in compiled else LEAST_SECONDS
            visit.attempt(row, trained, visit, case, row, least=least)


def trained(visit: Visit, case: Case, row: Row) -> list[Row]:
    """The row of one candidate.

    Raises:
        ValueError: its error on the first batch is another than the reference implementation's.
    """
    name, w = row["name"], case.w
    expected = case.error(CANDIDATES[name].rule)
    candidate = make(name, case.setup, case.weights)
    error = float(candidate.step(case.first))
    if not abs(error / expected - 1) <= TOLERANCE[visit.device]:
        raise ValueError(f"error {error:.6g} on the first batch, the reference has {expected:.6g}")

    def step() -> None:
        candidate.step(next(case.batches))

    memory = peak_memory(step, visit.device) / (4 * w.B * w.F)
    samples = interleaved({"product": case.floor, "step": step}, visit.device, visit.rounds, visit.share(1, SECONDS))
    ratio = spread([own / f for own, f in zip(samples["step"], samples["product"])]).ms
    return [{**row, **vars(spread(samples["step"])), "of product": ratio, "peak of [B, F]": memory}]

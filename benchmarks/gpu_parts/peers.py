"""One training step of each library that is installed, of plain PyTorch and of ours (benchmarks/peers).

As benchmarks/peer_steps.py, but in one process, for the time that starting others takes. A candidate whose error on the
first batch is not that of ours under the same rule, which comes first, gets no figure.
"""

from __future__ import annotations

import torch

from benchmarks.gpu_parts.visit import Visit, operands
from benchmarks.measure import product
from benchmarks.peer_steps import TOLERANCE
from benchmarks.peers import CANDIDATES, Setup, initial_weights, installed, make
from benchmarks.workloads import activations
from sampled_sae.timing import interleaved, peak_memory, spread


def run(visit: Visit) -> None:
    w = visit.workloads[0] if visit.rehearse else visit.workloads[1]
    setup = Setup(w.B, w.d, w.F, w.k, device=visit.device)
    weights = initial_weights(setup)
    x = activations(w, 0).to(visit.device)
    floor = product(*operands(w, visit.device, torch.float32 if visit.rehearse else torch.bfloat16))
    expected: dict[str, float] = {}
    for name in CANDIDATES:
        why = reason_to_skip(visit, name)
        if why:
            visit.add({"name": name, **w.columns(), "note": why})
            continue
        try:
            candidate = make(name, setup, weights)
            error, rule = float(candidate.step(x)), str(CANDIDATES[name].rule)
            if abs(error / expected.setdefault(rule, error) - 1) > TOLERANCE[visit.device]:
                raise ValueError(f"error {error:.6g} on the first batch, ours has {expected[rule]:.6g}")
            memory = peak_memory(lambda candidate=candidate: candidate.step(x), visit.device) / (4 * w.B * w.F)
            calls = {"product": floor, "step": lambda candidate=candidate: candidate.step(x)}
            samples = interleaved(calls, visit.device, visit.rounds, seconds=max(1.0, visit.left / 4))
        except Exception as error:
            note = " ".join(f"FAILED: {type(error).__name__}: {error}".split())
            visit.add({"name": name, **w.columns(), "note": note[:300]})
            continue
        ratio = spread([own / f for own, f in zip(samples["step"], samples["product"])]).ms
        figures = {**vars(spread(samples["step"])), "of product": ratio, "peak of [B, F]": memory}
        visit.add({"name": name, **w.columns(), **figures})
        del candidate, calls
        visit.release()


def reason_to_skip(visit: Visit, name: str) -> str | None:
    if not installed(name):
        return "not installed"
    if visit.rehearse and "torch.compile" in name:
        return "left out: the compiler takes longer than the rehearsal"
    return "no time left" if visit.left < 5 else None

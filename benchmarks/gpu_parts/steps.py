"""Whole training steps under bf16 autocast: every rule, with torch's Adam and RowAdam, and as a CUDA graph.

As multiples of the encoder product in the same rounds, with peak memory; beside them the eager step of the same rule.
All do the same: forward, backward, clip, projection of the decoder's gradient, Adam, unit decoder rows, and every
batch is another than the last. The aux loss is off: no feature is dead, and a graph would compute it all the same.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu_parts.compiling import Named, compile_all, small
from benchmarks.gpu_parts.graphs import captured
from benchmarks.gpu_parts.visit import Row, Visit, batches, operands
from benchmarks.measure import product
from benchmarks.workloads import Workload
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig
from sampled_sae.bench import EagerStep, Settings, eager_bytes
from sampled_sae.config import pool_size
from sampled_sae.support.timing import Call, free_memory, interleaved, peak_memory, spread

RULES: dict[str, dict[str, Any]] = {
    "l=4": {"l": 4.0},
    "l=None (BatchTopK)": {"l": None},
    "token (TopK)": {"l": None, "select": "token"},
    "l=1": {"l": 1.0},
    "l=16": {"l": 16.0},
}
# torch's fused Adam on dense gradients, or RowAdam in this mode
OPTIMIZERS = {"Adam": None, "RowAdam dense": "dense", "RowAdam decayed": "decayed"}
COMPARED = ("l=4", "l=None (BatchTopK)", "token (TopK)")
LR, CLIP = 1e-3, 1.0
# for a row, at most, and what has to be left to begin one
SECONDS, LEAST_SECONDS = 2, 3


class Step:
    """One whole step on a batch [B, d]; gradients are gone between steps."""

    def __init__(self, made: SampledSAE, rule: dict[str, Any], mode: str | None) -> None:
        self.sae = copy.deepcopy(made)
        self.sae.cfg = dataclasses.replace(made.cfg, row_grads=mode is not None, **rule)
        self.dense = mode is None
        if mode is None:
            capturable = self.sae.W_dec.is_cuda
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.sae.parameters(), lr=LR, fused=True, capturable=capturable
            )
        else:
            self.optimizer = RowAdam(self.sae, lr=LR, clip=CLIP, mode=mode)

    def forward_backward(self, x: torch.Tensor) -> None:
        self._backward(x)
        self.optimizer.zero_grad()

    def __call__(self, x: torch.Tensor) -> None:
        self._backward(x)
        if self.dense:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), CLIP)
            self.sae.project_decoder_grad()
        self.optimizer.step()
        if self.dense:
            self.sae.normalize_decoder()
        self.optimizer.zero_grad()

    def _backward(self, x: torch.Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            out = self.sae(x)
        out.loss.backward()


class Case:
    """What the steps of one workload share: weights, batches and the floor."""

    def __init__(self, w: Workload, device: str) -> None:
        self.w = w
        cfg = SampledSAEConfig(d_in=w.d, d_sae=w.F, k=w.k, impl="triton", aux_coefficient=0.0)
        self.made = SampledSAE(cfg, device=device)
        self.batches = batches(w, device)
        self.floor = product(*operands(w, device, torch.bfloat16))

    def steps(self) -> Iterator[tuple[str, dict[str, Any], str | None]]:
        """Name, rule and optimizer's mode of each."""
        for name, rule in RULES.items():
            # the pool is the whole dictionary: BatchTopK once more
            if rule["l"] is not None and pool_size(self.w.k, rule["l"], self.w.F) == self.w.F:
                continue
            for optimizer, mode in OPTIMIZERS.items():
                if optimizer == "RowAdam dense" or name == "l=4":
                    yield f"{name}, {optimizer}", rule, mode


def run(visit: Visit) -> None:
    compile_all(visit, ours, [(w, visit.device) for w in small(visit, visit.workloads)])
    cases: list[Case] = []
    for w in visit.workloads:
        visit.attempt({"name": "all", **w.columns()}, plain_rows, visit, w, cases)
    # last of all: after a capture that failed, torch gives no memory back and captures nothing more
    for case in cases:
        for name, rule, mode in case.steps():
            row = {"name": f"{name}, graph", **case.w.columns()}
            if visit.rehearse:
                visit.add({**row, "note": "left out: a graph needs CUDA"})
            elif not visit.attempt(row, graph_row, visit, case, row, rule, mode, least=LEAST_SECONDS):
                return


def ours(w: Workload, device: str) -> Iterator[Named]:
    """To be compiled."""
    case = Case(w, device)
    for name, rule, mode in case.steps():
        yield f"{name}, {w.name}", lambda rule=rule, mode=mode: Step(case.made, rule, mode)(next(case.batches))


def plain_rows(visit: Visit, w: Workload, cases: list[Case]) -> list[Row]:
    """Adds the rows of one workload, but for those of graphs, and the case to `cases`; there are no other rows."""
    case = Case(w, visit.device)
    for name, rule, mode in case.steps():
        row = {"name": name, **w.columns()}
        visit.attempt(row, our_row, visit, case, row, rule, mode, least=LEAST_SECONDS)
    for name in COMPARED:
        row = {"name": f"{name}, eager PyTorch", **w.columns()}
        visit.attempt(row, eager_row, visit, case, row, RULES[name], least=LEAST_SECONDS)
    cases.append(case)
    return []


def our_row(visit: Visit, case: Case, row: Row, rule: dict[str, Any], mode: str | None) -> list[Row]:
    step = Step(case.made, rule, mode)
    step(next(case.batches))
    memory = peak_memory(lambda: step(next(case.batches)), visit.device)
    return [times(visit, case, row, lambda: step(next(case.batches)), memory, step.forward_backward)]


def graph_row(visit: Visit, case: Case, row: Row, rule: dict[str, Any], mode: str | None) -> list[Row]:
    # held while the graph works on its weights
    step = Step(case.made, rule, mode)
    return [times(visit, case, row, captured(step, case.batches))]


def eager_row(visit: Visit, case: Case, row: Row, rule: dict[str, Any]) -> list[Row]:
    """Plain PyTorch under the same rule."""
    w, dtype = case.w, "float32" if visit.rehearse else "bfloat16"
    settings = Settings(w.d, w.F, w.B, w.k, device=visit.device, dtype=dtype, **rule)
    if eager_bytes(settings) > free_memory(visit.device):
        return [{**row, "note": "left out: not enough memory"}]
    step = EagerStep(settings, case.made)

    def whole() -> None:
        step(next(case.batches))
        # what it keeps of the gradients would hide as much of the next step's memory
        step.optimizer.zero_grad()

    whole()
    return [times(visit, case, row, whole, peak_memory(whole, visit.device))]


def times(
    visit: Visit,
    case: Case,
    row: Row,
    step: Call,
    memory: int | None = None,
    forward_backward: Callable[[torch.Tensor], None] | None = None,
) -> Row:
    """Of one step, and of the same without its optimizer, as multiples of the floor."""
    calls = {"product": case.floor, "step": step}
    if forward_backward is not None:
        calls["without optimizer"] = lambda: forward_backward(next(case.batches))
    samples = interleaved(calls, visit.device, visit.rounds, visit.share(1, SECONDS))
    ratios = {call: spread([own / f for own, f in zip(samples[call], samples["product"])]).ms for call in calls}
    row = {**row, **vars(spread(samples["step"])), "of product": ratios["step"]}
    if forward_backward is not None:
        row["without optimizer, of product"] = ratios["without optimizer"]
    return {**row, "peak of [B, F]": None if memory is None else memory / (4 * case.w.B * case.w.F)}

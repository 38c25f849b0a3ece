"""Whole training steps under bf16 autocast: every rule, with torch's Adam and RowAdam, and as a CUDA graph.

As multiples of the encoder product in the same rounds, with peak memory; beside them the eager step of the same rule.
The aux loss is off: no feature is dead, and a graph would compute it all the same.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_parts.visit import Visit, operands
from benchmarks.measure import product
from benchmarks.workloads import Workload, activations
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig
from sampled_sae.bench import EagerStep, Settings, eager_bytes
from sampled_sae.config import pool_size
from sampled_sae.timing import free_memory, interleaved, peak_memory, spread

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


class Step:
    """Forward, backward and optimizer on one batch."""

    def __init__(self, made: SampledSAE, rule: dict[str, Any], mode: str | None, x: torch.Tensor) -> None:
        self.sae, self.x = copy.deepcopy(made), x
        self.sae.cfg = dataclasses.replace(made.cfg, row_grads=mode is not None, **rule)
        if mode is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.sae.parameters(), lr=1e-4, fused=True, capturable=x.is_cuda
            )
        else:
            self.optimizer = RowAdam(self.sae, lr=1e-4, mode=mode)

    def forward_backward(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.x.device.type, torch.bfloat16):
            out = self.sae(self.x)
        out.loss.backward()

    def __call__(self) -> None:
        self.forward_backward()
        self.optimizer.step()


def captured(step: Step) -> Callable[[], None]:
    """The step as a CUDA graph; what it did before the capture counts as its warm-up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def run(visit: Visit) -> None:
    for w in visit.workloads:
        cfg = SampledSAEConfig(d_in=w.d, d_sae=w.F, k=w.k, impl="triton", aux_coefficient=0.0)
        made = SampledSAE(cfg, device=visit.device)
        x = activations(w, 0).to(visit.device)
        floor = product(*operands(w, visit.device, torch.bfloat16))
        for name, rule in RULES.items():
            # the pool is the whole dictionary: BatchTopK once more
            if rule["l"] is not None and pool_size(w.k, rule["l"], w.F) == w.F:
                continue
            for optimizer, mode in OPTIMIZERS.items():
                if visit.left > 5 and (optimizer == "RowAdam dense" or name == "l=4"):
                    timed_step(visit, w, f"{name}, {optimizer}", Step(made, rule, mode, x), floor)
                    visit.release()
            if name in COMPARED and visit.left > 5:
                eager(visit, w, name, rule, made, x, floor)
                visit.release()
        del made, x, floor
        visit.release()


def timed_step(visit: Visit, w: Workload, name: str, step: Step, floor: Callable[[], Any]) -> None:
    """The rows of one step, called and as a graph."""
    step()
    memory = peak_memory(step.forward_backward, visit.device)
    times(visit, w, name, floor, step, memory, step.forward_backward)
    if visit.rehearse:
        visit.add({"name": f"{name}, graph", **w.columns(), "note": "left out: a graph needs CUDA"})
        return
    try:
        times(visit, w, f"{name}, graph", floor, captured(step))
    except RuntimeError as error:
        visit.add({"name": f"{name}, graph", **w.columns(), "note": f"FAILED: {error}"[:300]})


def times(
    visit: Visit,
    w: Workload,
    name: str,
    floor: Callable[[], Any],
    step: Callable[[], Any],
    memory: int | None = None,
    forward_backward: Callable[[], Any] | None = None,
) -> None:
    """The row of one step, and of the same without its optimizer, as multiples of the floor."""
    calls = {"product": floor, "step": step}
    if forward_backward is not None:
        calls["without optimizer"] = forward_backward
    samples = interleaved(calls, visit.device, visit.rounds, seconds=max(1.0, visit.left / 4))
    ratios = {call: spread([own / f for own, f in zip(samples[call], samples["product"])]).ms for call in calls}
    row = {"name": name, **w.columns(), **vars(spread(samples["step"])), "of product": ratios["step"]}
    if forward_backward is not None:
        row["without optimizer, of product"] = ratios["without optimizer"]
    visit.add({**row, "peak of [B, F]": None if memory is None else memory / (4 * w.B * w.F)})


def eager(
    visit: Visit, w: Workload, name: str, rule: dict[str, Any], made: SampledSAE, x: torch.Tensor, floor: Any
) -> None:
    """The row of plain PyTorch under the same rule."""
    name = f"{name}, eager PyTorch"
    dtype = "float32" if visit.rehearse else "bfloat16"
    settings = Settings(w.d, w.F, w.B, w.k, device=visit.device, dtype=dtype, **rule)
    if eager_bytes(settings) > free_memory(visit.device):
        visit.add({"name": name, **w.columns(), "note": "left out: not enough memory"})
        return
    step = EagerStep(settings, made)
    step(x)
    memory = peak_memory(lambda: step(x), visit.device)
    times(visit, w, name, floor, lambda: step(x), memory)

"""The parts `ceilings`, `score` and `kernels`: operations of benchmarks/operations, kernels alone on the clock.

Ceilings: copy bandwidth, and the encoder product by cuBLAS at the widths of real models. Score: the score kernel with
its epilogue and without, which decides up to which d scores are fused into the product (LARGEST_FUSED_D of
kernels/configs.py). Kernels: every operation against eager PyTorch and torch.topk, and last, at the first workload,
against torch.compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu_parts.compiling import Named, compile_all, small
from benchmarks.gpu_parts.visit import Visit
from benchmarks.measure import Row
from benchmarks.operations import OPERATIONS, PRODUCT, SCORE_FORMS, Operations
from benchmarks.operations.operation import Inputs
from benchmarks.operations.race import Race
from benchmarks.workloads import GPU_KERNELS, REHEARSAL, Workload

# at one B and F, so that they compare
WIDTHS = tuple(Workload(f"d={d}", 8192, d, 32768, 64) for d in (576, 768, 2304, 4096))
# what has to be left to begin an operation, and one that torch.compile has to compile first
LEAST_SECONDS, LEAST_TO_COMPILE = 2, 12


@dataclass(frozen=True)
class Races:
    """What a part times, and at most how many rounds and seconds each of its races takes."""

    operations: Operations
    workloads: tuple[Workload, ...]
    # the kernels' own dtype first, in case the time runs out
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    rounds: int = 15
    seconds: float = 3.0
    compiled: bool = False


RACES = {
    "ceilings": Races(PRODUCT, WIDTHS),
    "score": Races(SCORE_FORMS, WIDTHS),
    "kernels": Races(OPERATIONS, GPU_KERNELS, (torch.bfloat16,), rounds=11, seconds=0.3, compiled=True),
}


def run(visit: Visit) -> None:
    races = RACES[visit.part]
    workloads = REHEARSAL if visit.rehearse else races.workloads
    cases = [(w, dtype) for dtype in races.dtypes for w in workloads]
    if visit.part != "ceilings":
        few = [(w, dtype) for dtype in races.dtypes for w in small(visit, workloads)]
        compile_all(visit, ours, [(w, visit.device, dtype, visit.part) for w, dtype in few])
    for i, case in enumerate(cases):
        race_all(visit, case, (len(cases) - i) * len(races.operations))
    if races.compiled:
        race_all(visit, cases[0], len(races.operations), "eager" if visit.rehearse else "inductor")


def ours(w: Workload, device: str, dtype: torch.dtype, part: str) -> Iterator[Named]:
    """To be compiled."""
    inputs = Inputs(w, device, dtype, "triton")

    def call(name: str) -> None:
        operation = RACES[part].operations[name](inputs)
        operation.prepare()
        operation.ours()

    for name in RACES[part].operations:
        yield f"{name}, {w.name}", lambda name=name: call(name)


def race_all(visit: Visit, case: tuple[Workload, torch.dtype], of: int, backend: str | None = None) -> None:
    """Rows of all operations, which are the first of so many; with a backend of torch.compile those of it alone."""
    w, dtype = case
    inputs = Inputs(w, visit.device, dtype, "triton")
    form, least = ("all", LEAST_SECONDS) if backend is None else ("torch.compile", LEAST_TO_COMPILE)
    for i, name in enumerate(RACES[visit.part].operations):
        same = {"operation": name, "dtype": str(dtype).removeprefix("torch."), **w.columns(), "form": form}
        visit.attempt(same, raced, visit, name, inputs, of - i, backend, least=least)


def raced(visit: Visit, name: str, inputs: Inputs, of: int, backend: str | None) -> list[Row]:
    races = RACES[visit.part]
    race = Race(name, inputs, races.operations[name](inputs), backend, small=visit.rehearse)
    race.run(1 if visit.rehearse else races.rounds, visit.share(of, races.seconds))
    return [row for row in race.rows() if backend is None or row["form"].startswith("torch.compile")]

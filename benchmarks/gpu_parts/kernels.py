"""Every operation against eager PyTorch and torch.topk, and last, at the first workload, against torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_parts.compiling import Named, compile_all, small
from benchmarks.gpu_parts.visit import Row, Visit
from benchmarks.kernels import OPERATIONS
from benchmarks.kernels.operation import Inputs, Operation
from benchmarks.kernels.race import Race
from benchmarks.workloads import GPU_KERNELS, REHEARSAL, Workload

SECONDS = 0.3  # for the rounds of one operation
ROUNDS = 11
DTYPE = torch.bfloat16
# for an operation, and for one that torch.compile has to compile first
LEAST_SECONDS, LEAST_TO_COMPILE = 2, 12


def run(visit: Visit) -> None:
    workloads = REHEARSAL if visit.rehearse else GPU_KERNELS
    compile_all(visit, ours, [(w, visit.device) for w in small(visit, workloads)])
    for i, workload in enumerate(workloads):
        race_all(visit, workload, (len(workloads) - i) * len(OPERATIONS))
    race_all(visit, workloads[0], len(OPERATIONS), "eager" if visit.rehearse else "inductor")


def ours(w: Workload, device: str) -> Iterator[Named]:
    """To be compiled."""
    inputs = Inputs(w, device, DTYPE, "triton")

    def call(make: Callable[[Inputs], Operation]) -> None:
        operation = make(inputs)
        operation.prepare()
        operation.ours()

    for name, make in OPERATIONS.items():
        yield f"{name}, {w.name}", lambda make=make: call(make)


def race_all(visit: Visit, workload: Workload, of: int, backend: str | None = None) -> None:
    """Rows of all operations, which are the first of so many; with a backend of torch.compile those of it alone."""
    inputs = Inputs(workload, visit.device, DTYPE, "triton")
    form, least = ("all", LEAST_SECONDS) if backend is None else ("torch.compile", LEAST_TO_COMPILE)
    for i, name in enumerate(OPERATIONS):
        row = {"operation": name, **workload.columns(), "form": form}
        visit.attempt(row, raced, visit, name, inputs, of - i, backend, least=least, reason="left out")


def raced(visit: Visit, name: str, inputs: Inputs, of: int, backend: str | None) -> list[Row]:
    race = Race(name, inputs, OPERATIONS[name](inputs), backend, small=visit.rehearse)
    race.run(1 if visit.rehearse else ROUNDS, visit.share(of, SECONDS))
    return [row for row in race.rows() if backend is None or row["form"].startswith("torch.compile")]

"""Every operation against eager PyTorch and torch.topk, and at the first workload against torch.compile."""

from __future__ import annotations

import torch

from benchmarks.gpu_parts.visit import Row, Visit
from benchmarks.kernels import OPERATIONS
from benchmarks.kernels.operation import Inputs, Operation
from benchmarks.kernels.race import Race
from benchmarks.workloads import GPU_KERNELS, REHEARSAL

SECONDS = 0.5  # for the rounds of one operation
ROUNDS = 11


def run(visit: Visit) -> None:
    workloads = REHEARSAL if visit.rehearse else GPU_KERNELS
    for workload in workloads:
        inputs = Inputs(workload, visit.device, torch.bfloat16, "triton")
        # the compiler takes seconds an operation
        backend = "eager" if visit.rehearse else "inductor" if workload is workloads[0] else None
        for name, make in OPERATIONS.items():
            same = {"operation": name, **workload.columns()}
            if visit.left < 5:
                visit.add({**same, "form": "all", "left out": "no time left"})
                continue
            try:
                visit.add(*raced(visit, name, inputs, make(inputs), backend))
            except torch.OutOfMemoryError as error:
                visit.add({**same, "form": "all", "left out": str(error).splitlines()[0][:200]})
            visit.release()
        del inputs
        visit.release()


def raced(visit: Visit, name: str, inputs: Inputs, operation: Operation, backend: str | None) -> list[Row]:
    race = Race(name, inputs, operation, backend, small=visit.rehearse)
    race.run(1 if visit.rehearse else ROUNDS, SECONDS)
    return race.rows()

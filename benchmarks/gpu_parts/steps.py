"""The parts `steps` and `peers`: experiments of benchmarks/steps, one candidate after the other in this process.

Starting others would take most of the time. No figure for a candidate whose first error is not the reference's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu_parts.compiling import Named, compile_all, small
from benchmarks.gpu_parts.visit import Visit
from benchmarks.peers import make
from benchmarks.steps.experiments import EXPERIMENTS, Tasks, on_a_gpu
from benchmarks.steps.harness import Harness, Task
from benchmarks.steps.session import Size
from benchmarks.worker import Here
from benchmarks.workloads import GPU_STEPS, Workload

# graphs last of all: after a capture that failed, torch gives no memory back and captures nothing more
EXPERIMENTS_OF = {"steps": ("gpu_steps", "gpu_graphs"), "peers": ("peer_steps",)}
ROUNDS, SECONDS = 15, 2
# what has to be left to begin a candidate, and one that has to be compiled first
LEAST_SECONDS, LEAST_TO_COMPILE = 3, 15


def run(visit: Visit) -> None:
    fixed = {"device": visit.device, "dtype": "bfloat16", "threads": torch.get_num_threads(), "start": Here}
    rounds, warm_up = (1, 0) if visit.rehearse else (ROUNDS, 1)
    harness = Harness(**fixed, rounds=rounds, seconds=SECONDS, warm_up=warm_up)
    if visit.part == "steps":
        compile_all(visit, first_steps, [(w, harness) for w in small(visit, visit.workloads)])
    for name in EXPERIMENTS_OF[visit.part]:
        options = EXPERIMENTS[name].options
        for task in tasks(visit, name):
            if why := left_out(visit, task):
                visit.add({**task.row, "reason": why})
                continue
            least = LEAST_TO_COMPILE if compiles(task) else LEAST_SECONDS
            visit.attempt(task.row, Harness(**{**vars(harness), **options}).measure_group, [task], least=least)
            if task.entry.graph and "reason" in visit.rows[-1]:
                return


def tasks(visit: Visit, name: str) -> Tasks:
    """Of the peers one size; what is compiled comes last, because nothing ends a compilation that takes too long."""
    found = EXPERIMENTS[name].tasks(visit.rehearse, "cuda")
    if visit.part == "peers" and not visit.rehearse:
        found = [task for task in found if task.workload == GPU_STEPS[1]]
    return sorted(found, key=compiles)


def left_out(visit: Visit, task: Task) -> str:
    if visit.rehearse and task.entry.graph:
        return "left out: a graph needs CUDA"
    return "left out: the compiler takes longer than the rehearsal" if visit.rehearse and compiles(task) else ""


def compiles(task: Task) -> bool:
    return bool(task.entry.options.get("compiled"))


def first_steps(w: Workload, harness: Harness) -> Iterator[Named]:
    """Ours, to be compiled."""
    setup = harness.setup(w)
    size = Size(setup)
    for name, entry in on_a_gpu(graph=False).items():
        if entry.module == "ours":
            yield f"{name}, {w.name}", lambda entry=entry: make(entry, setup, size.weights).step(size.batches[0])

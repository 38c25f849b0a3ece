"""Fills Triton's cache from several processes: compilation takes longer than all timings together."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.record import Record, failure
from benchmarks.worker import Worker, WorkerError
from benchmarks.workloads import Workload

# processes at most, each with a context of its own on the GPU
COMPILERS = 12
SPARE_CORES = 2
# of the time that is left, for compilation
SHARE = 0.5
# seconds for a compilation that was begun before the end
PATIENCE = 5
# jobs of a rehearsal, which does each again when it is timed
REHEARSED = 2
# what code does not depend on, but for the width of a row or a chunk
FEW_TOKENS, FEW_FEATURES = 512, 8192

Job = Callable[[], Any]


def compile_all(record: Record, jobs: Mapping[str, Job]) -> None:
    """Does every job in one of several processes; what fails gets a row.

    A process that dies, or is not done in time, does not stop the others.
    """
    count, end = processes(record), time.time() + SHARE * record.left
    todo = list(jobs.items())[: REHEARSED if record.rehearse else None]
    workers = [Worker(Compiler) for _ in range(count)]
    for i, worker in enumerate(workers):
        worker.ask("run", todo[i::count], end)
    for worker in workers:
        try:
            failed = worker.answer(None if end == math.inf else end + PATIENCE - time.time())
            record.add(*({"name": f"compiling {name}", "reason": why} for name, why in failed))
        except WorkerError as error:
            record.add({"name": "compiling", "reason": str(error)})
        worker.close()


def processes(record: Record) -> int:
    return 1 if record.rehearse else max(1, min(COMPILERS, (os.cpu_count() or 1) - SPARE_CORES))


class Compiler:
    def run(self, jobs: Sequence[tuple[str, Job]], end: float) -> list[tuple[str, str]]:
        """Does them until `end`; returns which failed, and why."""
        failed = []
        for name, job in jobs:
            if time.time() > end:
                break
            try:
                job()
            except Exception as error:
                failed.append((name, failure(error)))
        return failed


def small(record: Record, workloads: Iterable[Workload]) -> list[Workload]:
    """One of few tokens and features for each width and k."""
    if record.rehearse:
        return list(workloads)
    kept = {(w.d, w.k): w for w in workloads}
    return [Workload(w.name, FEW_TOKENS, w.d, FEW_FEATURES, w.k) for w in kept.values()]

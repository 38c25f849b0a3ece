"""Times candidates in turn, each beside the encoder product, and refuses those whose first error is wrong."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import Row, spread_columns
from benchmarks.peers import Entry, Setup, installed
from benchmarks.steps.session import StepSession
from benchmarks.worker import Worker, WorkerError
from benchmarks.workloads import Workload

# relative, of the first batch's error; bfloat16 moves some kept entries
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
# of the calls beside a step, those of which the faster is the floor
FLOORS = ("product", "chunks")
Sample = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A candidate at a size; tasks of one group take their samples in turn; labels are further columns of its row."""

    name: str
    entry: Entry
    workload: Workload
    group: str
    labels: Row = field(default_factory=dict)

    @property
    def compiled(self) -> bool:
        """By torch.compile."""
        return bool(self.entry.options.get("compiled"))

    @property
    def row(self) -> Row:
        """Without figures."""
        return {**self.workload.columns(), **self.labels, "candidate": self.name}


@dataclass(frozen=True)
class Harness:
    """How steps are timed.

    Attributes:
        beside: calls that are timed before each step (`StepSession`).
        device, dtype, threads: where, and in what.
        rounds, seconds, warm_up: samples of each candidate, fewer where those of a group take so long, after some
            rounds for nothing.
        memory: bytes that the processes of a group may take together.
        checked: whose the first error has to be: of the "reference", of the candidate "beside", or "" for nobody's.
        session: what a process makes of a candidate.
        start: `Worker`, or `Here` for one candidate after the other in this process.
    """

    beside: tuple[str, ...] = ("product",)
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    rounds: int = 7
    seconds: float = math.inf
    warm_up: int = 2
    memory: float = 18 * 2.0**30
    checked: str = "reference"
    session: Callable[..., StepSession] = StepSession
    start: type = Worker

    def groups(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        """What takes its samples in turn, as far as it fits into the memory."""
        for name in dict.fromkeys(task.group for task in tasks):
            yield from fitting([task for task in tasks if task.group == name], self.memory)

    def measure_group(self, tasks: Sequence[Task]) -> list[Row]:
        """The rows of tasks whose samples are taken in turn; one that failed has a `reason` and no figures."""
        rows = [task.row for task in tasks]
        running: dict[int, Any] = {}
        for i, task in enumerate(tasks):
            with reason_in(rows[i]):
                running[i] = self.started(task, rows[i], {row["candidate"]: row for row in rows[:i]})
        samples = samples_in_turn(running, rows, self.rounds, self.seconds, self.warm_up)
        for i in samples:
            with reason_in(rows[i]):
                rows[i] |= figures(samples[i], tasks[i].workload, running[i].call("peak_bytes"))
                rows[i] |= running[i].call("afterwards")
        for worker in running.values():
            worker.close()
        names = [task.name for task in tasks]
        for i, task in enumerate(tasks):
            other = names.index(task.entry.beside) if task.entry.beside in names else None
            if i in samples and other in samples:
                pairs = zip(samples[i], samples[other])
                rows[i] |= spread_columns([own["step"] / theirs["step"] for own, theirs in pairs], "quotient")
        return rows

    def setup(self, w: Workload) -> Setup:
        return Setup(w.B, w.d, w.F, w.k, device=self.device, dtype=self.dtype)

    def started(self, task: Task, row: Row, others: dict[str, Row]) -> Any:
        """A worker whose first step was right; `others` are the rows of candidates that were started before.

        Raises:
            WorkerError: there is none.
        """
        if not installed(task.entry):
            raise WorkerError("not installed")
        if task.entry.graph and self.device == "cpu":
            raise WorkerError("left out: a graph needs CUDA")
        args = (task.entry, self.setup(task.workload), self.threads, self.beside)
        worker = self.start(self.session, *args, tree=task.entry.tree)
        row["first_error"] = error = worker.call("first_error")
        if self.checked == "beside":
            # not under autocast, which rounds
            beside = None if task.entry.dtype else task.entry.beside
            expected = others.get(beside or "", {}).get("first_error")
        else:
            expected = worker.call("expected_error") if self.checked else None
        if expected is not None:
            row["reference_error"] = expected
            row["error_off"] = abs(error / expected - 1)
            if not row["error_off"] <= TOLERANCE[task.entry.dtype or self.dtype]:
                worker.close()
                raise WorkerError(f"first error {error:.6g}, expected {expected:.6g}")
        return worker


@contextmanager
def reason_in(row: Row) -> Iterator[None]:
    """A worker that fails leaves its reason there."""
    try:
        yield
    except WorkerError as failure:
        row["reason"] = str(failure)


def samples_in_turn(
    workers: Mapping[Any, Any], rows: Any, rounds: int, seconds: float = math.inf, warm_up: int = 2
) -> dict[Any, list[Sample]]:
    """What each worker's `sample` gives, round by round, after `warm_up` rounds for nothing.

    One that fails is left out, and its row, under the same key, has the reason.
    """
    found: dict[Any, list[Sample]] = {name: [] for name in workers}
    start = time.perf_counter()
    for round_ in range(-warm_up, rounds):
        for name in list(found):
            with reason_in(rows[name]):
                sample = workers[name].call("sample")
                found[name] += [sample] if round_ >= 0 else []
            if "reason" in rows[name]:
                del found[name]
        if round_ >= 0 and time.perf_counter() - start > seconds:
            break
    return found


def fitting(tasks: Sequence[Task], limit: float) -> Iterator[list[Task]]:
    """Tasks that fit into `limit` bytes together: weights, moments and a [B, F] each, ten [B, F] for a step.

    A task stays with the one it stands beside.
    """
    group: list[Task] = []
    taken = largest = 0.0
    for task in tasks:
        w = task.workload
        block = 4 * w.B * w.F
        each = 4 * 7 * w.d * w.F + block + 2**29
        if group and task.entry.beside is None and taken + each + 10 * max(largest, block) > limit:
            yield group
            group, taken, largest = [], 0.0, 0.0
        group.append(task)
        taken, largest = taken + each, max(largest, block)
    yield group


def figures(samples: Sequence[Sample], workload: Workload, peak: int | None) -> Row:
    """Milliseconds, ratios to the floor, and memory."""
    found: Row = {"rounds": len(samples)}
    for name in samples[0]:
        found |= spread_columns([1e3 * sample[name] for sample in samples], f"{name}_ms")
    floor = min((name for name in FLOORS if name in samples[0]), key=lambda name: found[f"{name}_ms"])
    found |= spread_columns([sample["step"] / sample[floor] for sample in samples], "ratio")
    found["floor_ms"] = found[f"{floor}_ms"]
    if "allocating" in samples[0]:
        found["ratio_to_allocating_product"] = statistics.median(s["step"] / s["allocating"] for s in samples)
    if "without_optimizer" in samples[0]:
        found["ratio_without_optimizer"] = statistics.median(s["without_optimizer"] / s[floor] for s in samples)
    memory = None if peak is None else peak / (4 * workload.B * workload.F)
    return {**found, "peak_bytes": peak, "peak_extra_memory": memory}

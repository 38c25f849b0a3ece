"""Milliseconds of calls side by side, and the memory they take at their peak, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of some samples in ms, and how many there were."""

    ms: float
    p20: float
    p80: float
    rounds: int


def spread(samples: Sequence[float]) -> Spread:
    ordered = sorted(samples)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return Spread(statistics.median(ordered), low, high, len(ordered))


def timed(function: Call, device: torch.device | str = "cpu") -> float:
    """Seconds that one call takes; on a GPU until its last kernel has ended."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return 1e-3 * first.elapsed_time(last)


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device | str,
    rounds: int,
    seconds: float = float("inf"),
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; `warm_up` makes all calls once before.

    Every round goes over all calls in turn, so that they see the same clock and the same neighbours. The last
    round is the one that ends after `seconds`.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    if warm_up:
        for call in calls.values():
            call()
    start = time.perf_counter()
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(1e3 * timed(call, device))
        if time.perf_counter() - start > seconds:
            break
    return samples


class Sections:
    """Milliseconds of named sections; on a GPU read from events at the end, so that nothing waits in between."""

    def __init__(self, device: torch.device | str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.marks.append((name, start, self._now()))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                return function(*args, **kwargs)

        return call

    def read(self) -> dict[str, list[float]]:
        """The samples since the last reading, by name."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for name, start, end in self.marks:
            took = start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)
            found.setdefault(name, []).append(took)
        self.marks = []
        return found

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory(function: Call, device: torch.device | str = "cpu") -> int:
    """Bytes at the peak of a call above those held before it.

    Without a GPU of the whole process, which should hold nothing else that comes and goes.

    Raises:
        OSError: the system does not tell.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    held = resident("VmRSS")
    function()
    return max(0, resident("VmHWM") - held)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def free_memory(device: torch.device | str = "cpu") -> float:
    """Bytes that may still be taken; inf where the system does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), float("inf"))

"""Milliseconds of calls side by side, and the memory they take at their peak, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

# on a GPU, what is overwritten before a queued call: several times its L2 cache
SCRATCH_BYTES = 1 << 28
# clock cycles for which a queued call waits, 2 to 3 ms: longer than the host takes to launch it
QUEUEING_CYCLES = 1 << 22


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


def timed(function: Call, device: torch.device | str = "cpu", queued: bool = False) -> float:
    """Seconds that one call takes; on a GPU from an idle device until the call's last kernel has ended.

    The host's work before and between launches counts, as it does for whoever makes the call. With `queued` a GPU is
    kept busy until all is launched, and its L2 cache is emptied: what the kernels alone take.
    """
    if not on_gpu(device):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    stream = torch.cuda.current_stream(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    # held to the end, so that the call gets no memory that is in the cache
    scratch = keep_busy(device) if queued else None
    first.record(stream)
    function()
    last.record(stream)
    torch.cuda.synchronize(device)
    del scratch
    return 1e-3 * first.elapsed_time(last)


def on_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def keep_busy(device: torch.device | str) -> torch.Tensor:
    """Queues what empties the L2 cache, then a wait; the memory that was overwritten."""
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=device).zero_()
    with torch.cuda.device(device):
        torch.cuda._sleep(QUEUEING_CYCLES)
    return scratch


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device | str,
    rounds: int,
    seconds: float = float("inf"),
    warm_up: bool = True,
    queued: bool = False,
    prepare: Call = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; `warm_up` makes all calls once before.

    Every round goes over all calls in turn, so that they see the same clock and the same neighbours. The last
    round is the one that ends after `seconds`. `prepare` comes before each call, untimed; `queued` as for `timed`.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    if warm_up:
        for call in calls.values():
            prepare()
            call()
    start = time.perf_counter()
    for _ in range(rounds):
        for name, call in calls.items():
            prepare()
            samples[name].append(1e3 * timed(call, device, queued))
        if time.perf_counter() - start > seconds:
            break
    return samples


class Sections:
    """Milliseconds of named sections; on a GPU read from events at the end, so that nothing waits in between.

    Sections of one name add up until `next_sample`.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self.marks: list[tuple[str, int, Any, Any]] = []
        self.sample = 0

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.marks.append((name, self.sample, start, self._now()))

    def next_sample(self) -> None:
        self.sample += 1

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                return function(*args, **kwargs)

        return call

    def read(self) -> dict[str, list[float]]:
        """The samples since the last reading, by name; 0 where one has no section of that name."""
        gpu = on_gpu(self.device)
        if gpu:
            torch.cuda.synchronize(self.device)
        samples = list(dict.fromkeys(sample for _, sample, *_ in self.marks))
        found: dict[str, dict[int, float]] = {}
        for name, sample, start, end in self.marks:
            took = found.setdefault(name, dict.fromkeys(samples, 0.0))
            took[sample] += start.elapsed_time(end) if gpu else 1e3 * (end - start)
        self.marks = []
        return {name: list(took.values()) for name, took in found.items()}

    def _now(self) -> Any:
        if not on_gpu(self.device):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def peak_memory(function: Call, device: torch.device | str = "cpu") -> int:
    """Bytes at the peak of a call above those held before it.

    Without a GPU of the whole process, which should hold nothing else that comes and goes.

    Raises:
        OSError: the system does not tell.
    """
    gc.collect()
    if on_gpu(device):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
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


def check_memory(what: str, needed: float, device: torch.device | str = "cpu") -> None:
    """MemoryError that begins with `what` where so many bytes are not free: the system may end a process that tries."""
    free = free_memory(device)
    if needed > free:
        raise MemoryError(f"{what}: about {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")


def machine() -> str:
    """Which machine it is whose memory this is: containers on one have the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def free_memory(device: torch.device | str = "cpu") -> float:
    """Bytes that may still be taken; inf where the system does not tell."""
    if on_gpu(device):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), float("inf"))

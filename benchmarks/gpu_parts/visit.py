"""What every part of a visit to a GPU is given: where to compute, how long it may take, where its rows go."""

from __future__ import annotations

import csv
import io
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.measure import PEERS, Row, machine
from benchmarks.worker import one_line
from benchmarks.workloads import GPU_STEPS, REHEARSAL, Workload
from sampled_sae.support.atomic_files import write_json, write_text

# Linux: which NVIDIA driver is loaded
DRIVER = Path("/proc/driver/nvidia/version")
LONGEST_REASON = 300


@dataclass
class Visit:
    """One part's share of the visit.

    Attributes:
        part, out: its name and the folder for its results.
        seconds: after which it should come to an end.
        rehearse: tiny sizes on the CPU, kernels in Triton's interpreter.
        rows: what has been found; on disk as soon as it is added.
    """

    part: str
    out: Path
    seconds: float
    rehearse: bool
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start = time.perf_counter()
        self.add()

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def workloads(self) -> tuple[Workload, ...]:
        return REHEARSAL if self.rehearse else GPU_STEPS

    @property
    def left(self) -> float:
        """Seconds until the part should end; without end in a rehearsal, which must see everything."""
        return float("inf") if self.rehearse else self.seconds - (time.perf_counter() - self._start)

    def share(self, of: int, most: float = float("inf")) -> float:
        """Seconds for one of so many things that are still to be timed, at most `most`."""
        return max(0.0, min(most, self.left / max(1, of)))

    def add(self, *rows: Row) -> None:
        """Appends rows and writes all of them, as <part>.json and <part>.csv."""
        self.rows += rows
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / f"{self.part}.json", {**self.head, "rows": self.rows})
        if self.rows:
            columns = list(dict.fromkeys(name for row in self.rows for name in row))
            text = io.StringIO()
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(self.rows)
            write_text(self.out / f"{self.part}.csv", text.getvalue())

    def attempt(self, row: Row, measure: Callable[..., Iterable[Row]], *args: Any, least: float = 1.0) -> None:
        """Adds the rows that `measure(*args)` finds, or `row` with the reason why there are none.

        It is not begun where less than `least` seconds are left.
        """
        if self.left < least:
            self.add({**row, "reason": "no time left"})
            return
        try:
            self.release()
            self.add(*measure(*args))
        except Exception as error:
            self.add({**row, "reason": failure(error)})

    @cached_property
    def head(self) -> Row:
        """Of the JSON: device, versions, date and command, as `benchmarks.measure.machine` has them, and more."""
        return {
            **machine(self.device, PEERS),
            "device": "rehearsal, no GPU" if self.rehearse else torch.cuda.get_device_name(),
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "driver": driver(),
            "cores": os.cpu_count(),
            "command": f"python benchmarks/gpu.py OUTDIR --only {self.part}" + " --rehearse" * self.rehearse,
        }

    def release(self) -> None:
        """Gives the GPU memory back that the last row left in the cache."""
        if not self.rehearse:
            torch.cuda.empty_cache()


def driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    found = re.search(r"Module.*?\s(\d+\.[\d.]+)", DRIVER.read_text()) if DRIVER.exists() else None
    return found[1] if found else None


def failure(error: Exception) -> str:
    """In one line for a row."""
    return f"FAILED: {one_line(error)}"[:LONGEST_REASON]

"""What every part of a visit to a GPU is given: where to compute, how long it may take, where its rows go."""

from __future__ import annotations

import csv
import io
import os
import platform
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.workloads import GPU_STEPS, REHEARSAL, Workload
from sampled_sae.files import write_json, write_text

Row = dict[str, Any]


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
    def rounds(self) -> int:
        return 1 if self.rehearse else 15

    @property
    def left(self) -> float:
        """Seconds until the part should end; without end in a rehearsal, which must see everything."""
        return float("inf") if self.rehearse else self.seconds - (time.perf_counter() - self._start)

    def add(self, *rows: Row) -> None:
        """Appends rows and writes all of them, as <part>.json and <part>.csv."""
        self.rows += rows
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / f"{self.part}.json", {**self.machine(), "rows": self.rows})
        if self.rows:
            columns = list(dict.fromkeys(name for row in self.rows for name in row))
            text = io.StringIO()
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(self.rows)
            write_text(self.out / f"{self.part}.csv", text.getvalue())

    def machine(self) -> Row:
        return {
            "device": "rehearsal, no GPU" if self.rehearse else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "date": date.today().isoformat(),
            "command": f"python benchmarks/gpu.py OUTDIR --only {self.part}" + " --rehearse" * self.rehearse,
        }

    def release(self) -> None:
        """Gives cached GPU memory back."""
        if not self.rehearse:
            torch.cuda.empty_cache()


def operands(w: Workload, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random x [B, d] and W [F, d]."""
    generator = torch.Generator(device).manual_seed(1)
    x, W = (torch.randn(n, w.d, generator=generator, device=device) for n in (w.B, w.F))
    return x.to(dtype), (W / w.d**0.5).to(dtype)

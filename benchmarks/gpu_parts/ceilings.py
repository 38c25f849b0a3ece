"""Copy bandwidth, and the encoder product by cuBLAS at the widths of real models."""

from __future__ import annotations

import torch

from benchmarks.gpu_parts.visit import Visit, operands
from benchmarks.measure import product
from benchmarks.workloads import Workload
from sampled_sae.timing import interleaved, spread

DTYPES = (torch.bfloat16, torch.float32)
COPY_ELEMENTS, REHEARSED_ELEMENTS = 1 << 28, 1 << 12


def run(visit: Visit) -> None:
    elements = REHEARSED_ELEMENTS if visit.rehearse else COPY_ELEMENTS
    source, target = (torch.ones(elements, device=visit.device) for _ in range(2))
    times = spread(interleaved({"copy": lambda: target.copy_(source)}, visit.device, visit.rounds)["copy"])
    visit.add({"name": "copy", **vars(times), "GB/s": 8e-6 * elements / times.ms})
    for w in widths(visit):
        for dtype in DTYPES:
            x, W = operands(w, visit.device, dtype)
            times = spread(interleaved({"product": product(x, W)}, visit.device, visit.rounds)["product"])
            rate = 2e-9 * w.B * w.d * w.F / times.ms
            kind = str(dtype).removeprefix("torch.")
            visit.add({"name": "product", "dtype": kind, **w.columns(), **vars(times), "TFLOP/s": rate})
            visit.release()


def widths(visit: Visit) -> tuple[Workload, ...]:
    """The models' widths at one B and F, so that they compare."""
    if visit.rehearse:
        return visit.workloads
    return tuple(Workload(f"d={d}", 8192, d, 32768, 64) for d in (576, 768, 2304, 4096))

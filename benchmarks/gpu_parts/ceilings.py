"""Copy bandwidth, and the encoder product by cuBLAS at the widths of real models."""

from __future__ import annotations

import torch

from benchmarks.gpu_parts.visit import Row, Visit, dtype_name, operands
from benchmarks.measure import product
from benchmarks.workloads import Workload
from sampled_sae.support.timing import Call, Spread, interleaved, spread

# the kernels' own dtype first, in case the time runs out
DTYPES = (torch.bfloat16, torch.float32)
COPY_ELEMENTS, REHEARSED_ELEMENTS = 1 << 28, 1 << 12


def run(visit: Visit) -> None:
    cases = [(w, dtype) for dtype in DTYPES for w in widths(visit)]
    visit.attempt({"name": "copy"}, copy, visit, 1 + len(cases))
    for i, (w, dtype) in enumerate(cases):
        row = {"name": "product", "dtype": dtype_name(dtype), **w.columns()}
        visit.attempt(row, cublas, visit, row, w, dtype, len(cases) - i)


def copy(visit: Visit, of: int) -> list[Row]:
    elements = REHEARSED_ELEMENTS if visit.rehearse else COPY_ELEMENTS
    source, target = (torch.ones(elements, device=visit.device) for _ in range(2))
    times = timed_alone(visit, lambda: target.copy_(source), of)
    return [{"name": "copy", **vars(times), "GB/s": 8e-6 * elements / times.ms}]


def cublas(visit: Visit, row: Row, w: Workload, dtype: torch.dtype, of: int) -> list[Row]:
    times = timed_alone(visit, product(*operands(w, visit.device, dtype)), of)
    return [{**row, **vars(times), "TFLOP/s": 2e-9 * w.B * w.d * w.F / times.ms}]


def timed_alone(visit: Visit, call: Call, of: int) -> Spread:
    """Of one call, the first of so many."""
    seconds = visit.share(of)
    return spread(interleaved({"": call}, visit.device, visit.rounds, seconds, queued=True)[""])


def widths(visit: Visit) -> tuple[Workload, ...]:
    """The models' widths at one B and F, so that they compare."""
    if visit.rehearse:
        return visit.workloads
    return tuple(Workload(f"d={d}", 8192, d, 32768, 64) for d in (576, 768, 2304, 4096))

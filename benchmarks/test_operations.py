"""pytest benchmarks/ --benchmark-only: every operation of ours; `-m ""` adds the large sizes.

Beside pytest-benchmark's own figures, which count the host's work, the JSON's `extra_info` (`--benchmark-json FILE`)
has the row of `python -m benchmarks.operations`: ours, rivals and ceilings in turn.
"""

import pytest
import torch

from benchmarks.operations import OPERATIONS
from benchmarks.operations.operation import Inputs
from benchmarks.operations.race import race
from benchmarks.workloads import CPU_KERNELS, GPU_KERNELS, LARGE_KERNELS

ON_GPU = torch.cuda.is_available()
SMALL, LARGE = (GPU_KERNELS[:2], GPU_KERNELS[2:]) if ON_GPU else (CPU_KERNELS, LARGE_KERNELS)
WORKLOADS = [*SMALL, *(pytest.param(w, marks=(pytest.mark.slow, pytest.mark.timeout(1800))) for w in LARGE)]
SECONDS = 3.0


@pytest.fixture(scope="module")
def inputs(request):
    return Inputs(request.param, "cuda" if ON_GPU else "cpu", torch.bfloat16 if ON_GPU else torch.float32)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("inputs", WORKLOADS, ids=lambda w: w.name, indirect=True)
def test_operation(inputs, operation, benchmark):
    made = OPERATIONS[operation](inputs)
    benchmark.extra_info["row"] = row = race(operation, inputs, made, seconds=SECONDS)
    assert row["check"] == "passed"
    benchmark.group = inputs.workload.name
    wait = torch.cuda.synchronize if ON_GPU else lambda: None

    def prepare():
        made.prepare()
        wait()

    def ours():
        made.ours()
        wait()

    benchmark.pedantic(ours, setup=prepare, rounds=row["rounds"])

"""pytest benchmarks/ --benchmark-only: every operation against its rivals; `-m ""` adds the large sizes.

pytest-benchmark times our form; before each of its rounds one sample is taken of every rival and ceiling, so that all
see the same clock and the same neighbours. Figures of all of them stand in the JSON's `extra_info`
(`--benchmark-json FILE`).
"""

import pytest
import torch

from benchmarks.operations import OPERATIONS
from benchmarks.operations.operation import Inputs
from benchmarks.operations.race import Race
from benchmarks.workloads import CPU_KERNELS, GPU_KERNELS, LARGE_KERNELS

ON_GPU = torch.cuda.is_available()
SMALL, LARGE = (GPU_KERNELS[:2], GPU_KERNELS[2:]) if ON_GPU else (CPU_KERNELS, LARGE_KERNELS)
WORKLOADS = [*SMALL, *(pytest.param(w, marks=(pytest.mark.slow, pytest.mark.timeout(1800))) for w in LARGE)]
SECONDS, LEAST, MOST = 3.0, 3, 15


@pytest.fixture(scope="module")
def inputs(request):
    return Inputs(request.param, "cuda" if ON_GPU else "cpu", torch.bfloat16 if ON_GPU else torch.float32)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("inputs", WORKLOADS, ids=lambda w: w.name, indirect=True)
def test_operation(inputs, operation, benchmark):
    race = Race(operation, inputs, OPERATIONS[operation](inputs))
    rounds = race.rounds_within(SECONDS, LEAST, MOST)

    def ours():
        race.calls["ours"]()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = inputs.workload.name
    benchmark.pedantic(ours, setup=lambda: race.round(without="ours"), rounds=rounds)
    if benchmark.enabled:
        race.samples["ours"] = [1e3 * seconds for seconds in benchmark.stats.stats.data]
        benchmark.extra_info["row"] = row = race.row()
        assert row["check"] == "passed"

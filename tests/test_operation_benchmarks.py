"""benchmarks/operations at tiny sizes: every operation is right, and a wrong one gets no speedup."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.operations import OPERATIONS
from benchmarks.operations.operation import Inputs
from benchmarks.operations.race import COLUMNS, race
from benchmarks.record import markdown
from benchmarks.workloads import Workload

ROOT = Path(__file__).parents[1]
SIZES = Workload("odd", 37, 17, 333, 3)


def row_of(inputs, name, backend=None):
    return race(name, inputs, OPERATIONS[name](inputs), 2, 60, backend, small=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    check_row(name, torch.bfloat16, None)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_beside_a_compiled_rival(name):
    check_row(name, torch.float32, "eager")


def check_row(name, dtype, backend):
    inputs = Inputs(SIZES, "cpu", dtype, "torch")
    row = row_of(inputs, name, backend)
    assert row["check"] == "passed"
    assert row["impl"] == "torch"
    assert row["rounds"] == 2
    assert row["bytes"] > 0
    assert row["GB/s"] == pytest.approx(1e-6 * row["bytes"] / row["ms"])
    assert row["of product"] == pytest.approx(row["TFLOP/s"] / row["product TFLOP/s"])
    assert set(row["rivals"]) >= ({"eager"} if backend is None else {"eager", "torch.compile, eager"})
    assert all(rival["factor"] > 0 for rival in row["rivals"].values())
    assert f"| {name} |" in markdown(COLUMNS, [row])


def nearly(parts):
    """The same parts, each a little wrong."""

    def select(*args, **kwargs):
        codes = parts.select(*args, **kwargs)
        return codes.scaled(torch.full((codes.shape[1],), 1.01))

    def pool(scores, size):
        members = parts.candidate_pool(scores, size)
        return torch.cat((members[1:], (~torch.isin(torch.arange(len(scores)), members)).nonzero()[0])).sort().values

    def adam(weight, *args):
        parts.row_adam_(weight, *args)
        weight += 1e-4

    return dataclasses.replace(
        parts,
        column_scores=lambda *args: 1.001 * parts.column_scores(*args),
        candidate_pool=pool,
        select=select,
        decode=lambda *args: 1.001 * parts.decode(*args),
        row_adam_=adam,
    )


@pytest.mark.parametrize("name", [name for name in OPERATIONS if not name.startswith("top-k")])
def test_what_is_wrong_gets_no_speedup(name):
    inputs = Inputs(SIZES, "cpu", torch.float32, "torch")
    inputs.parts = nearly(inputs.parts)
    row = row_of(inputs, name)
    assert row["check"] != "passed"
    assert [rival["factor"] for rival in row["rivals"].values()] == [None] * len(row["rivals"])
    assert row["check"] in markdown(COLUMNS, [row])


@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("l", [4.0, None])
def test_a_dropped_or_doubled_entry_is_noticed(select, l):
    name = f"select l={'None' if l is None else 4}" + (", token" if select == "token" and l is None else "")
    for change in (lambda v, t, f: (v[1:], t[1:], f[1:]), lambda *e: tuple(torch.cat((c, c[:1])) for c in e)):
        inputs = Inputs(SIZES, "cpu", torch.float32, "torch")
        whole = inputs.parts.select

        def changed(*args, whole=whole, change=change, **kwargs):
            codes = whole(*args, **kwargs)
            return type(codes)(*change(*codes.entries()), codes.shape)

        inputs.parts = dataclasses.replace(inputs.parts, select=changed)
        assert row_of(inputs, name)["check"] != "passed"


def test_the_eager_form_is_left_out_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr("benchmarks.operations.race.free_memory", lambda device: 1000)
    row = row_of(Inputs(SIZES, "cpu", torch.float32, "torch"), "score l2")
    assert row["check"] == "passed"
    assert row["rivals"] == {"eager": {"reason": "needs about 0 GB"}}


@pytest.mark.slow
def test_the_pytest_entry(tmp_path):
    """One operation of one workload, as `pytest benchmarks/ --benchmark-only` runs it."""
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-q", f"--benchmark-json={out}"]
    command += ["-k", "SmolLM2 and pool", "-p", "no:cacheprovider"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (found,) = json.loads(out.read_text())["benchmarks"]
    ours = found["extra_info"]["row"]
    assert ours["check"] == "passed"
    assert ours["rounds"] == found["stats"]["rounds"]
    assert found["stats"]["median"] > 0

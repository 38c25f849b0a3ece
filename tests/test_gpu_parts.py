"""What a visit to a GPU does about failures, wrong results and time; on the CPU, in the interpreter, at tiny sizes."""

import argparse
import math
import os
import time
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_parts import candidates, compiling, summary, tuning
from benchmarks.measure import driver
from benchmarks.operations import OPERATIONS, SCORE_FORMS
from benchmarks.operations.operation import Inputs
from benchmarks.operations.race import verdict
from benchmarks.record import Record
from benchmarks.workloads import REHEARSAL
from sampled_sae.kernels import configs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")


@pytest.fixture
def record(tmp_path):
    args = argparse.Namespace(out=tmp_path / "part.json", threads=torch.get_num_threads(), within=math.inf)
    return Record(args, lambda result: "")


def test_what_fails_leaves_its_reason_and_the_rest_goes_on(record):
    def fails():
        raise RuntimeError("out of resource:\nshared memory")

    record.attempt([{"operation": "score"}], fails)
    record.attempt([{"operation": "pool"}], lambda: [{"operation": "pool", "ms": 1.0}])
    reason = "FAILED: RuntimeError: out of resource: shared memory"
    assert record.rows == [{"operation": "score", "reason": reason}, {"operation": "pool", "ms": 1.0}]
    assert reason in record.out.read_text()
    assert summary.without_figures(record.rows) == [f"no figures: score: {reason}"]


def test_nothing_is_begun_without_time(record, monkeypatch):
    monkeypatch.setattr(Record, "left", 0.5)
    record.attempt([{"name": "a"}, {"name": "b"}], lambda: pytest.fail("it was begun"))
    assert record.rows == [{"name": name, "reason": "no time left"} for name in "ab"]


@pytest.mark.parametrize("name", SCORE_FORMS)
def test_forms_of_the_score_are_checked(name):
    inputs = Inputs(REHEARSAL[0], "cpu", torch.float32, "triton")
    operation = SCORE_FORMS[name](inputs)
    assert verdict(operation) == "passed"
    # what is checked stays, what the kernel is given changes
    inputs.x = -inputs.x
    assert "allowed are" in verdict(operation)


def test_a_compiler_outlives_failures_and_ends_in_time():
    made = []
    jobs = [("0", lambda: made.append(0)), ("1", lambda: {}["tile"]), ("2", lambda: made.append(2))]
    assert compiling.Compiler().run(jobs, math.inf) == [("1", "FAILED: KeyError: 'tile'")]
    assert made == [0, 2]
    assert compiling.Compiler().run(jobs, time.time() - 1) == []
    assert made == [0, 2]


def noted(name, folder):
    """In a process of its own: leaves a file, fails, or dies."""
    {"fail": lambda: {}["tile"], "crash": lambda: os._exit(9)}.get(name, (folder / name).touch)()


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(
    ("how", "reason"), [("fail", "FAILED: KeyError: 'tile'"), ("crash", "the process died, exit code 9")]
)
def test_compiling_is_shared_and_a_process_may_fail_or_crash(record, monkeypatch, tmp_path, how, reason):
    monkeypatch.setattr(compiling, "processes", lambda record: 2)
    compiling.compile_all(record, {name: partial(noted, name, tmp_path) for name in ("a", how, "b")})
    assert [row["reason"] for row in record.rows] == [reason]
    assert {"a", "b"} <= {file.name for file in tmp_path.iterdir()}


def test_driver_version(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr("benchmarks.measure.DRIVER", file)
    assert driver() is None
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 1 00:00:00 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build",
    ):
        file.write_text(text + "\nGCC version:  gcc version 12.2.0\n")
        assert driver() == "570.86.15"


@pytest.mark.slow
def test_configurations_are_put_in_use_and_back():
    for choice, names in tuning.CHOICES.items():
        dtype = torch.bfloat16 if choice in ("described_config", "product_filter_config") else torch.float32
        operation = (OPERATIONS | SCORE_FORMS)[names[0]](Inputs(REHEARSAL[0], "cpu", dtype, "triton"))
        found = tuning.candidates_of(choice, operation)
        assert len(found) > 1, choice
        real = tuning.in_use(choice)
        for config in found.values():
            with tuning.using(choice, config):
                now = tuning.in_use(choice)
                assert (now if choice == "FOLD" else now("interpreter")) is config
        assert tuning.in_use(choice) is real


def test_neighbours_differ_in_one_thing(monkeypatch):
    monkeypatch.setattr(candidates, "INTERPRETED", argparse.Namespace(value=False))
    tile = configs.tile(64, 32, 16, 1, 2)
    found = [
        (*c.kwargs.values(), c.num_warps, c.num_stages)
        for c in candidates.candidates("column_scores_config", tile).values()
    ]
    assert found[0] == (64, 32, 16, 8, 1, 2)
    assert {(i, n) for one in found[1:] for i, n in enumerate(one) if n != found[0][i]} == {
        *{(0, 128), (0, 32), (1, 64), (1, 16), (2, 32), (2, 8), (4, 2), (5, 3), (5, 1)}
    }
    assert len(found) == 1 + 9
    rows = candidates.candidates("rows_config", configs.rows_config("sm_90", 500))
    assert [(c.kwargs["BP"], c.num_warps) for c in rows.values()] == [(512, 1), (512, 2)]


def test_a_configuration_with_another_result_is_refused(monkeypatch):
    inputs = Inputs(REHEARSAL[0], "cpu", torch.float32, "triton")
    row = {"table": "rows_config", "operation": "top-k of the block, l=4, token"}
    good = tuning.candidates_of(row["table"], OPERATIONS[row["operation"]](inputs))
    worse = list(good)[1]

    def wrong(operation):
        in_use = candidates.written(configs.rows_config("interpreter", 8))
        return "3 entries differ" if in_use == worse else verdict(operation)

    monkeypatch.setattr(tuning, "verdict", wrong)
    rows = tuning.tried(inputs, row, 1)
    assert [r["config"] for r in rows] == list(good)
    assert [r["config"] for r in rows if r.get("reason") == "3 entries differ"] == [worse]
    assert all("ms" in r for r in rows if r["config"] != worse)


def test_advice_takes_the_mean_over_sizes():
    same = {"table": "T", "operation": "o", "d": 1, "F": 1, "in use": "now"}
    races = (("now", 1, 1.0), ("now", 2, 1.0), ("new", 1, 0.5), ("new", 2, 1.0), ("once", 1, 0.1))
    rows = [{**same, "config": config, "B": B, "of current": ratio} for config, B, ratio in races]
    assert list(tuning.advice(rows)) == ["T: new  # 0.707 of now"]
    assert list(tuning.advice(rows[:2])) == ["T: now  # stays"]

"""benchmarks/gpu.py end to end, as on the day a GPU is at hand, in the interpreter and at tiny sizes."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import gpu
from benchmarks.gpu_parts import summary
from benchmarks.gpu_parts.visit import Visit

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", str(tmp_path), "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) < 100
    rows = {}
    for part in gpu.PARTS:
        result = json.loads((tmp_path / f"{part}.json").read_text())
        assert set(result) >= {"device", "threads", "torch", "triton", "cuda", "driver", "python", "date", "command"}
        rows[part] = result["rows"]
        with (tmp_path / f"{part}.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(rows[part]) > 0
    assert rows["correctness"][0]["PASSED"] > 0
    checks = {row["operation"]: row["check"] for row in rows["kernels"] if row["form"] == "ours (triton)"}
    assert set(checks.values()) == {"passed"}
    assert not [row for row in rows["kernels"] if "left out" in row]
    assert {row["operation"] for row in rows["kernels"] if row["form"] == "torch.compile, eager"} == set(checks)
    assert [row["dtype"] for row in rows["score"]] == sorted(row["dtype"] for row in rows["score"])
    assert all("ms" in row for part in ("ceilings", "score") for row in rows[part])
    assert {row["note"] for row in rows["steps"] if row["name"].endswith("graph")} == {"left out: a graph needs CUDA"}
    assert {row["name"] for row in rows["peers"]} >= {"ours, l=4", "eager PyTorch BatchTopK"}
    tables = {row["table"] for row in rows["tuning"]}
    assert tables >= {"COLUMN_SCORES", "FOLD", "SEGMENT_SUM", "ENTRY_DOTS", "RADIX", "ROWS", "ROW_ADAM"}
    assert not [row["note"] for row in rows["tuning"] if "note" in row]
    assert (tmp_path / "tuning.txt").read_text().count("\n") > len(tables)
    assert json.loads((tmp_path / "best.json").read_text())


def test_a_part_that_fails_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"no_such_part": 5, "ceilings": 25})
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--rehearse"])
    assert gpu.main() == 1
    shown = capsys.readouterr().out
    assert "no_such_part" in shown
    assert "FAILED, exit status 1: ModuleNotFoundError" in shown
    assert "copy" in shown.split("ceilings")[1]
    assert (tmp_path / "table.txt").read_text() == shown
    assert json.loads((tmp_path / "ceilings.json").read_text())["rows"]


def test_what_was_found_before_a_crash_is_kept(tmp_path):
    visit = Visit("steps", tmp_path, 10, True)
    visit.add({"name": "l=4", "workload": "w", "of product": 1.5}, {"name": "l=16", "workload": "w", "note": "no"})
    lines = gpu.report("steps", tmp_path, "exit status -11: Segmentation fault", 3.0)
    assert lines[0] == "steps (3 s): FAILED, exit status -11: Segmentation fault (see steps.log)"
    assert any("1.50" in line for line in lines)
    assert gpu.report("peers", tmp_path, "stopped after 40 s", 40.0) == [
        "peers (40 s): FAILED, stopped after 40 s (see peers.log)"
    ]


def test_a_failed_check_shows_in_the_table():
    row = {"workload": "w", "operation": "score l2", "form": "ours (triton)", "ms": 2.0, "check": "passed"}
    eager = {"workload": "w", "operation": "score l2", "form": "eager", "ms": 6.0, "ours is faster by": 3.0}
    assert "2 (3.0x)" in summary.kernels([row, eager])[1]
    wrong = summary.kernels([{**row, "check": "values: error 1"}, {**eager, "ours is faster by": None}])
    assert "2 (!)" in wrong[1]
    assert wrong[2] == "score l2, w: values: error 1"


def test_all_parts_end_in_time():
    assert sum(gpu.PARTS.values()) + gpu.GRACE <= gpu.IN_ALL


def test_a_part_that_is_stopped_leaves_no_process_behind(tmp_path, monkeypatch):
    script = tmp_path / "part.sh"
    script.write_text('#!/bin/sh\nsleep 300 &\necho $! > "$4/pid"\nwait\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(gpu, "GRACE", 1)
    assert gpu.run_part("score", tmp_path, 1, False) == "stopped after 2 s"
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not running(child):
            return
        time.sleep(0.05)
    pytest.fail("its child still runs")


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"

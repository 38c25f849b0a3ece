"""benchmarks/gpu.py end to end, as on the day a GPU is at hand, in the interpreter and at tiny sizes."""

import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu
from benchmarks.gpu_parts import summary, tuning
from benchmarks.gpu_parts.compiling import REHEARSED
from benchmarks.operations import OPERATIONS

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
@pytest.mark.usefixtures("forked_workers")
def test_rehearsal(tmp_path, monkeypatch, capsys):
    """Each part in this process, which has imported what it needs; the next test starts one as the script does."""

    def run_part(part, out, seconds, rehearse):
        module, *arguments = gpu.command_of(part, out, seconds, rehearse)
        main = import_module(f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module)
        monkeypatch.setattr(sys, "argv", [main.__file__, *arguments, "--threads", "1"])
        with (out / f"{part}.log").open("w") as log, redirect_stdout(log):
            main.main()

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--rehearse"])
    assert gpu.main() == 0
    assert len(capsys.readouterr().out.splitlines()) < 100
    rows = {}
    for part in gpu.PARTS:
        result = json.loads((tmp_path / f"{part}.json").read_text())
        assert set(result) >= {"device", "threads", "torch", "python", "date", "command"}
        rows[part] = result["rows"]
        assert (tmp_path / f"{part}.md").read_text(encoding="utf-8").startswith("| ")
    assert rows["correctness"][0]["PASSED"] > 0
    assert {row["check"] for row in rows["kernels"]} == {"passed"}
    assert {row["impl"] for row in rows["kernels"]} == {"triton"}
    compiled = {row["operation"] for row in rows["kernels"] if "torch.compile, eager" in row["rivals"]}
    assert compiled == set(list(OPERATIONS)[:REHEARSED])
    assert {row["operation"] for row in rows["kernels"]} == set(OPERATIONS)
    assert [row["dtype"] for row in rows["score"]] == sorted(row["dtype"] for row in rows["score"])
    assert {row["check"] for part in ("ceilings", "score") for row in rows[part]} == {"passed"}
    graphs = [row for row in rows["steps"] if row["candidate"].endswith("graph")]
    assert {row["reason"] for row in graphs} == {"left out: a graph needs CUDA"}
    assert all("ratio" in row for row in rows["steps"] if row not in graphs)
    assert {row["candidate"] for row in rows["inference"] if "ratio" in row} >= {"ours", "eager PyTorch"}
    assert {row["candidate"] for row in rows["peers"]} >= {"ours, l=4", "eager PyTorch BatchTopK"}
    # a rehearsal's d is small: its searches filter within the product; the interpreter has descriptors
    tuned = set(tuning.CHOICES) - {"chunk_filter_config", "column_scores_config"}
    assert {row["table"] for row in rows["tuning"]} == tuned
    assert not [row["reason"] for row in rows["tuning"] if "reason" in row]
    assert (tmp_path / "tuning.txt").read_text().count("\n") >= len(tuned)
    assert json.loads((tmp_path / "best.json").read_text())


@pytest.mark.slow
def test_a_part_that_fails_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    parts = {"lost": (5, ["no_such_part"], []), "ceilings": gpu.PARTS["ceilings"]}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--rehearse"])
    assert gpu.main() == 1
    shown = capsys.readouterr().out
    assert "lost" in shown
    assert "FAILED, exit status 1" in shown
    assert "GB/s" in shown
    assert (tmp_path / "table.txt").read_text(encoding="utf-8") == shown
    assert json.loads((tmp_path / "ceilings.json").read_text())["rows"]


def test_what_was_found_before_a_crash_is_kept(tmp_path):
    rows = [{"candidate": "l=4", "workload": "w", "ratio": 1.5}, {"candidate": "l=16", "workload": "w", "reason": "no"}]
    (tmp_path / "steps.json").write_text(json.dumps({"device": "cpu", "rows": rows}))
    lines = gpu.report("steps", tmp_path, "exit status -11: Segmentation fault", 3.0)
    assert lines[0] == "steps (3 s): FAILED, exit status -11: Segmentation fault (see steps.log)"
    assert any("1.50" in line for line in lines)
    assert gpu.report("peers", tmp_path, "stopped after 40 s", 40.0) == [
        "peers (40 s): FAILED, stopped after 40 s (see peers.log)"
    ]


def test_a_failed_check_shows_in_the_table():
    row = {"workload": "w", "operation": "score l2", "ms": 2.0, "check": "passed", "rivals": {"eager": {"factor": 3.0}}}
    assert "2 ms (3.0x)" in summary.summary("kernels", [row])[1]
    wrong = {**row, "check": "values: error 1", "rivals": {"eager": {"factor": None}}}
    _, shown, why = summary.summary("kernels", [wrong])
    assert "2 ms (-) (!)" in shown
    assert why == "score l2, w: values: error 1"


def test_all_parts_end_in_time():
    assert sum(seconds for seconds, *_ in gpu.PARTS.values()) + gpu.GRACE <= gpu.IN_ALL


def test_a_part_that_is_stopped_leaves_no_process_behind(tmp_path, monkeypatch):
    """The part starts a child, which lives until it is killed, and says its id before it waits."""
    script = tmp_path / "part.sh"
    script.write_text(
        f'#!/bin/sh\nsleep 300 &\necho $! > "{tmp_path}/new"\nmv "{tmp_path}/new" "{tmp_path}/pid"\nwait\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    waited = subprocess.Popen.wait

    def wait(process, timeout=None):
        if timeout is None:
            return waited(process)
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        raise subprocess.TimeoutExpired("part", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    assert gpu.run_part("score", tmp_path, 1, False) == f"stopped after {1 + gpu.GRACE} s"
    child = int((tmp_path / "pid").read_text())
    while running(child):
        time.sleep(0.01)


def running(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False

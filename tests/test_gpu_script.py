"""benchmarks/gpu.py end to end, as on the day a GPU is at hand, in the interpreter and at tiny sizes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu
from benchmarks.gpu_parts import summary, tunable, tuning
from benchmarks.gpu_parts.visit import Visit
from benchmarks.workloads import REHEARSAL
from sampled_sae.kernels import configs

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_rehearsal(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", str(tmp_path), "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) < 100
    rows = {}
    for part in gpu.PARTS:
        result = json.loads((tmp_path / f"{part}.json").read_text())
        assert {"device", "torch", "triton", "date", "command"} <= set(result)
        rows[part] = result["rows"]
        with (tmp_path / f"{part}.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(rows[part]) > 0
    assert rows["correctness"][0]["PASSED"] > 0
    checks = {row["operation"]: row["check"] for row in rows["kernels"] if row["form"] == "ours (triton)"}
    assert set(checks.values()) == {"passed"}
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


def all_tunables():
    return tunable.tunables(REHEARSAL[0], "cpu", torch.float32)


def test_tunables_put_their_values_in_use_and_back():
    for one in all_tunables():
        reads = {
            "COLUMN_SCORES": lambda: configs.COLUMN_SCORES["interpreter", 32][0],
            "FOLD": lambda: tunable.column_scores.FOLD,
            "CHUNK_SCORES": lambda: configs.chunk_scores_config("interpreter"),
            "CHUNK_FILTER": lambda: configs.chunk_filter_config("interpreter"),
            "SEGMENT_SUM": lambda: configs.segment_sum_config("interpreter", torch.float32),
            "ENTRY_DOTS": lambda: configs.entry_dots_config("interpreter", torch.float32),
            "RADIX": lambda: configs.radix_config("interpreter"),
            "ROWS": lambda: configs.ROWS["interpreter"][0],
            "ROW_ADAM": lambda: configs.ROW_ADAM["interpreter"][0],
        }
        read = reads[one.table]
        assert read() is one.current
        for value in one.candidates:
            with one.using(value):
                assert read() is value
        assert read() is one.current


def test_a_configuration_with_another_result_is_refused(tmp_path):
    one = next(t for t in all_tunables() if t.table == "ROWS")
    good, call = one.candidates[0], one.call

    def wrong():
        out = call()
        if configs.ROWS["interpreter"][0] is good:
            out[0, 0] += 1
        return out

    one.call = wrong
    rows = tuning.tried(one, REHEARSAL[0], Visit("tuning", tmp_path, 10, True))
    assert [(row["current"], row.get("note")) for row in rows] == [(True, None), (False, "another result")]
    one.call, one.exact = call, False
    rows = tuning.tried(one, REHEARSAL[0], Visit("tuning", tmp_path, 10, True))
    assert all("ms" in row for row in rows)


def test_advice_takes_the_mean_over_sizes():
    same = {"table": "T", "key": "k", "d": 1, "F": 1}

    def row(config, B, ratio):
        return {**same, "config": config, "B": B, "of current": ratio, "current": config == "now"}

    rows = [row("now", 1, 1.0), row("now", 2, 1.0), row("new", 1, 0.5), row("new", 2, 1.0), row("once", 1, 0.1)]
    assert tuning.advice("T", "k", rows) == "T[k]: new  # 0.707 of now"
    assert tuning.advice("T", "k", rows[:2]) == "T[k]: now  # stays"
